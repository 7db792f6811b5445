"""Which answers of an interrupted evaluation can be taken over: those of the same settings."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.journal import Journal
from speechlm2_jax.evaluation.provenance import fingerprint
from speechlm2_jax.settings import to_plain

CHANGE_NO_ANSWER = frozenset(
    (
        *("pretrained_name", "batch_size", "continuous_batching", "device", "verbose"),
        *("use_normalizer", "encoder_wer", "output_manifest", "report", "report_rows"),
        "audio_folder",
    )
)
"""Keys under which an evaluation may be resumed with other values; the model is known by its
weights."""


def start_fingerprint(name: str) -> Future[str | None]:
    """Reads a model's files beside what else is to be done (`fingerprint`)."""
    pool = ThreadPoolExecutor(1)
    found = pool.submit(fingerprint, name)
    pool.shutdown(wait=False)
    return found


@contextmanager
def open_journal(
    path: Path | None,
    config: EvalConfig | DuplexEvalConfig,
    sha256: str | None,
    device: jax.Device,
    keys: Sequence[str],
) -> Iterator[Journal | None]:
    """The journal of an evaluation; None where nothing is to be written. Prints what it resumes.

    Raises SettingsError for a file that cannot be read or is being written.
    """
    if path is None:
        yield None
        return
    settings: dict[str, Any] = {
        "model": sha256 or config.pretrained_name,
        "platform": device.platform,
        **{k: v for k, v in to_plain(config).items() if k not in CHANGE_NO_ANSWER},
    }
    with Journal(path, settings, keys) as journal:
        if journal.note is not None:
            print(f"note   {journal.note}", flush=True)
        yield journal
