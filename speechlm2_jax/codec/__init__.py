"""Neural audio codec: waveforms <-> discrete codes [B, T, K]; frozen, always fp32."""
