"""Writes what the originals read: torch's files and `.nemo` archives. torch is not needed."""

from speechlm2_jax.conversion.writers.nemo import write_nemo
from speechlm2_jax.conversion.writers.torch_files import write_torch_file

__all__ = ["write_nemo", "write_torch_file"]
