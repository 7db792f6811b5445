"""Maths with no speech in it."""
