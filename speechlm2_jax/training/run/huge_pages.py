"""Huge memory pages for training on a CPU, where page faults take a seventh of the time.

Each step allocates its arrays anew, and the kernel maps them page by page. docs/performance.md has
the measurement. glibc uses pages of 2 MiB instead of 4 KiB if GLIBC_TUNABLES is set before the
program starts. So the program sets it and executes itself again.
"""

import os
import sys
from pathlib import Path

TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("nvidiactl", "accel0", "vfio/0", "kfd")
"""Files below /dev that show a GPU or a TPU, whose arrays are in device memory."""


def restart_with_huge_pages() -> None:
    """Executes this program again with huge pages, once, if that helps. It keeps the process id.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=0 turns it off.
    """
    if not _would_help():
        return
    tunables = os.environ.get(TUNABLES)
    value = f"{HUGE}=1" if not tunables else f"{tunables}:{HUGE}=1"
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, TUNABLES: value})


def _would_help() -> bool:
    if not sys.platform.startswith("linux") or HUGE in os.environ.get(TUNABLES, ""):
        return False
    if any(Path("/dev", name).exists() for name in ACCELERATORS):
        return False
    try:
        return "[madvise]" in KERNEL.read_text()
    except OSError:
        return False
