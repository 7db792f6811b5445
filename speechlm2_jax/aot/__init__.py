"""Compiling for TPUs that are not here: does a run fit, and what will a step cost."""
