"""Weights in and out: readers, the mapping engine, one table per architecture.

The only package that knows foreign parameter names.
"""
