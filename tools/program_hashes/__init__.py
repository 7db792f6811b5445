"""Hashes of the project's compiled programs: proof that a change of the code changed no maths."""
