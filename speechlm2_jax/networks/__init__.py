"""Whole models as pure functions: prepare -> forward -> losses."""
