"""Large memory pages for a training on a CPU, where a step else spends its time on page faults.

Every array of a step is fresh memory, mapped page by page: at 4 KiB each that took a seventh of the
processor's time (docs/performance.md). glibc asks the kernel for 2 MiB pages if a variable says so
before the program starts, so the program starts itself again.
"""

import os
import sys
from pathlib import Path

TUNABLES, HUGE = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("nvidiactl", "accel0", "vfio/0", "kfd")
"""Files below /dev where there is a GPU or a TPU, whose arrays do not lie in this memory."""


def restart_with_huge_pages() -> None:
    """Replaces this process by itself with large pages, once, where that helps; keeps its id.

    Say GLIBC_TUNABLES=glibc.malloc.hugetlb=0 to go without.
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
