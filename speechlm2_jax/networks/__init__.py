"""Whole models as pure maths: prepare -> forward -> losses."""
