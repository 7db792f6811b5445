"""Ahead-of-time compilation for TPU topologies: does a run fit, and what does a step cost?"""
