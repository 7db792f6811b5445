"""Rows of the table: one line of JSON each, printed by the process that measures.

A row has `part` and `what`, and either `status: "measured"` with numbers or `"skipped"` or
`"failed"` with the reason. A row that fails leaves the other rows of its part.
"""

import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, Literal

from benchmarks import timing

Row = dict[str, Any]
Status = Literal["measured", "skipped", "failed", "out of memory"]
OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "OutOfMemory")


class Rows:
    """Prints the rows of one part."""

    def __init__(self, part: str, limit_gib: float | None, until: float):
        """`limit_gib` is the device's memory, None if unknown; `until` a `time.monotonic`."""
        self._part, self.limit_gib, self._until = part, limit_gib, until

    @property
    def left_s(self) -> float:
        """Seconds until this part is stopped."""
        return self._until - time.monotonic()

    def fits(self, needed_gib: float) -> bool:
        """True if the device has so much memory, or does not report how much it has."""
        return self.limit_gib is None or needed_gib <= self.limit_gib

    def measure(
        self, what: str, call: Callable[[], Row], *, needed_gib: float = 0.0, needed_s: float = 0.0
    ) -> Status:
        """Runs `call` and prints its numbers, or why there are none."""
        if not self.fits(needed_gib):
            reason = f"needs about {needed_gib:.0f} GiB, the device has {self.limit_gib:.0f} GiB"
            return self.put(what, "skipped", reason=reason)
        if needed_s > self.left_s:
            reason = f"needs about {needed_s:.0f} s, {max(self.left_s, 0):.0f} s are left"
            return self.put(what, "skipped", reason=reason)
        timing.log(f"{self._part}: {what} ...")
        try:
            numbers = call()
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            is_memory = any(word in str(error) for word in OUT_OF_MEMORY)
            status: Status = "out of memory" if is_memory else "failed"
        else:
            return self.put(what, "measured", **numbers)
        gc.collect()  # what the failed call held is free for the next
        return self.put(what, status, reason=reason)

    def put(self, what: str, status: Status, **values: Any) -> Status:
        """Prints a row."""
        row = {"part": self._part, "what": what, "status": status, **values}
        print(json.dumps(row), flush=True)
        return status


def called(call: Callable[[], Any], repeats: int) -> tuple[timing.Timing, Row]:
    """Times a call: its first time, which compiles, and `repeats` further ones."""
    first_s, _ = timing.timed(call)
    taken = timing.measure(call, repeats=repeats, warmup=0)
    return taken, {
        "time_s": taken.as_list(),
        "first_call_s": first_s,
        "compile_s": max(first_s - taken.median_s, 0.0),
        "peak_memory_gib": timing.peak_device_memory_gib(),
    }


def table(rows: list[Row]) -> str:
    """The rows as a table for a terminal."""
    cells = [
        {
            "part": row["part"],
            "what": row["what"],
            "time (fastest to slowest)": _time(row.get("time_s")),
            "rate": _rate(row),
            "MFU": None if row.get("mfu") is None else f"{100 * row['mfu']:.1f} %",
            "compile, s": row.get("compile_s"),
            "peak GiB": row.get("peak_memory_gib"),
            "note": row.get("note", "") if row["status"] == "measured" else _why(row),
        }
        for row in rows
    ]
    return timing.markdown(cells)


def _why(row: Row) -> str:
    return f"{row['status']}: {row.get('reason', 'no reason given')}".replace("|", "/")


def _rate(row: Row) -> str | None:
    return f"{row['rate']:,.4g} {row['rate_unit']}" if "rate" in row else None


def _time(times_s: list[float] | None) -> str | None:
    if times_s is None:
        return None
    median, fastest, slowest = (1e3 * x for x in times_s)
    return f"{median:,.4g} ms ({fastest:,.4g} to {slowest:,.4g})"
