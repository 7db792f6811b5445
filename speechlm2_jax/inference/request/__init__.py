"""Reads a GenerationConfig: keys, values, logits processors, one `GenerationRequest`."""
