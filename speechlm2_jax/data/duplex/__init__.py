"""Conversations of two voices: readers, contents, dataset."""
