"""Shards that are read from front to end: NeMo's tarred data, and Lhotse SHAR.

Each data-parallel group reads shards of its own, in an order that is a pure function of the seed.
The bucket of each step is one too, so hosts agree on shapes without asking each other.
"""
