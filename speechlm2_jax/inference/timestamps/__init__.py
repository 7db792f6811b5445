"""Word timestamps: a known text is aligned with its recording by an ASR model."""

DEFAULT_ALIGNER = "nvidia/parakeet-ctc-0.6b"
"""The ASR model, of the hub, that aligns for models without a CTC head of their own."""
