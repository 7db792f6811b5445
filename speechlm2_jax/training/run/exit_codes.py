"""Exit codes of train.py, for scripts that start it again (docs/training.md)."""

FINISHED = 0
"""The run reached its end."""
FAILED = 1
BAD_INPUT = 2
"""Settings, data or files that a user must change: another start would end the same way."""
STALLED = 70
"""The watchdog ended the process. A new start resumes."""
