"""Data sets of any size: memory-mapped columns of every row in place of a list of them.

A manifest of `LARGE_ROWS` rows or more is read once, in parallel, into an index beside it. Plans
are made of the columns, and a row is parsed when its turn comes.
"""
