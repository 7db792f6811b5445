"""Bins and rows that fit a device: `python -m speechlm2_jax.data.plan CONFIG`."""
