"""Scores what a model answers: word errors, speed, and a record of how both were measured."""
