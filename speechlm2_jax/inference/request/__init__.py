"""Reads a GenerationConfig: checks its keys and values and makes a `GenerationRequest` of them."""
