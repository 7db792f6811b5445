"""Loops over time: sampling and answering."""
