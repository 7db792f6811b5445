"""Evaluation: generates a response to every input, scores it, writes manifest and report."""
