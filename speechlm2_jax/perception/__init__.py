"""Waveform -> LLM-width frames: mel front end, FastConformer, modality adapter, projection."""
