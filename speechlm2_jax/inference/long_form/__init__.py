"""Recordings longer than a model takes at once: cut, transcribed, joined."""
