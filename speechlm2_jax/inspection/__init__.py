"""An HTML page of a run's data: `python -m speechlm2_jax.data.inspect CONFIG`."""
