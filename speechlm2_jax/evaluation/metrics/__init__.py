"""Metrics of texts, tokens and turns."""
