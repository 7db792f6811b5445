"""Scores of texts, tokens and turns."""
