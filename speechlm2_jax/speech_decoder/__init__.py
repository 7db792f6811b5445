"""Autoregressive decoder of audio codes on an LLM's hidden states."""
