"""Resumes an interrupted evaluation: responses of the same model and settings are kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax

from speechlm2_jax.evaluation.config import CHANGE_NO_RESPONSE
from speechlm2_jax.evaluation.devices import Loaded, show
from speechlm2_jax.evaluation.journal import Journal, Kept
from speechlm2_jax.evaluation.provenance import fingerprint
from speechlm2_jax.evaluation.results import Speed, at_once, sum_of
from speechlm2_jax.evaluation.split import SplitJournal
from speechlm2_jax.settings import SettingsError, build, to_plain

T = TypeVar("T")


def start_fingerprint(name: str) -> Future[str | None]:
    """Computes `fingerprint` of a model's files in a background thread."""
    pool = ThreadPoolExecutor(1)
    found = pool.submit(fingerprint, name)
    pool.shutdown(wait=False)
    return found


def speed_of(rows: Iterable[Kept]) -> Speed:
    """The speed of all processes and sessions that wrote these rows.

    The processes of a session (the `part` of a row's progress) generate at the same time: their
    audio adds up, and the longest of their times counts.
    """
    latest: dict[str, Speed] = {}
    for kept in rows:
        name, speed = str(kept.progress.get("part", "/")), build(Speed, kept.progress["speed"])
        latest[name] = max(latest.get(name, speed), speed, key=lambda s: s.generate_s)
    sessions: dict[str, list[Speed]] = {}
    for name, speed in latest.items():
        sessions.setdefault(name.partition("/")[0], []).append(speed)
    return sum_of(at_once(parts) for parts in sessions.values())


class Journals:
    """Where the rows of an evaluation are written; one file, or one of each of several processes.

    Use as a context manager. `journal` is None without an output manifest, and on all processes but
    the first where several compute each response together.
    """

    def __init__(
        self,
        path: Path | None,
        loaded: Loaded[Any, Any],
        sha256: str | None,
        keys: Sequence[str],
    ) -> None:
        """Prints what is resumed.

        Raises SettingsError if the file cannot be read, another process is writing it, or several
        processes have none.
        """
        config = loaded.config
        settings: dict[str, Any] = {
            "model": sha256 or config.pretrained_name,
            "platform": loaded.device.platform,
            **{k: v for k, v in to_plain(config).items() if k not in CHANGE_NO_RESPONSE},
        }
        self.journal: Journal | None = None
        self._split: SplitJournal | None = None
        if path is None:
            if loaded.is_split:
                raise SettingsError(
                    "output_manifest: several processes need one, through which they exchange "
                    "their responses; name a file in a folder that all of them share"
                )
            return
        if loaded.is_split:
            self._split = SplitJournal(path, lambda file: Journal(file, settings, keys))
            self.journal = self._split.own
        elif jax.process_index() == 0:
            self.journal = Journal(path, settings, keys)
            self.journal.adopt_parts()
        if self.journal is not None and self.journal.note is not None:
            show(f"note   {self.journal.note}")

    def __enter__(self) -> "Journals":
        return self

    def __exit__(self, *error: Any) -> None:
        if self.journal is not None:
            self.journal.__exit__(*error)

    def finish(self, rows: Sequence[Mapping[str, object]], record: Mapping[str, object]) -> None:
        """Writes the output manifest, if there is one."""
        if self.journal is not None:
            self.journal.finish(rows, record)

    def run(self, evaluate: Callable[[Journal | None], T]) -> T | None:
        """Calls `evaluate` with the journal; the result is that of all processes.

        None on all processes but the first.
        """
        result = evaluate(self.journal)
        if self._split is not None:
            self._split.own.close()
            self.journal = self._split.take_parts()
            return None if self.journal is None else evaluate(self.journal)
        return result if jax.process_index() == 0 else None
