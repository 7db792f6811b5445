"""The commands of `speechlm2-jax`, one file each: `main(argv, program=...)`."""
