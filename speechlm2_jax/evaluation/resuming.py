"""Resumes an interrupted evaluation: responses of the same model and settings are kept."""

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

CHANGE_NO_RESPONSE = frozenset(
    (
        *("pretrained_name", "batch_size", "continuous_batching", "device", "verbose"),
        *("use_normalizer", "encoder_wer", "output_manifest", "report", "report_rows"),
        "audio_folder",
    )
)
"""Keys that may change when an evaluation is resumed. The model is identified by its weights, not
by its name."""


def start_fingerprint(name: str) -> Future[str | None]:
    """Computes `fingerprint` of a model's files in a background thread."""
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
    """The journal of an evaluation; None without an output manifest. Prints what it resumes.

    Raises SettingsError if the file cannot be read, or another process is writing it.
    """
    if path is None:
        yield None
        return
    settings: dict[str, Any] = {
        "model": sha256 or config.pretrained_name,
        "platform": device.platform,
        **{k: v for k, v in to_plain(config).items() if k not in CHANGE_NO_RESPONSE},
    }
    with Journal(path, settings, keys) as journal:
        if journal.note is not None:
            print(f"note   {journal.note}", flush=True)
        yield journal
