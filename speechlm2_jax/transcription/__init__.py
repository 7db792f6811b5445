"""What `speechlm2-jax transcribe` does: finds recordings and a model, and writes transcripts."""
