"""Word timestamps: a known text is aligned with its recording by an ASR model."""
