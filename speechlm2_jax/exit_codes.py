"""How a run ended, for what starts it again: exit codes of train.py, and a file.

docs/training.md, "How a run ends".
"""

MARKER = "FINISHED"
"""File of the run directory of a finished run: step, reason and time of its end, as JSON."""

FINISHED = 0
"""The run reached its end."""
FAILED = 1
BAD_INPUT = 2
"""Settings, data or files that a person must change: another start would end the same way."""
STALLED = 70
"""The watchdog ended the process. A new start resumes."""
UNFINISHED = 75
"""The run was stopped before its end, and saved: by a signal or a time limit. A new start resumes.
The number is that of `EX_TEMPFAIL` in sysexits.h: try again."""
