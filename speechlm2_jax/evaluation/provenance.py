"""Provenance of an evaluation: weights, versions, device, settings, date."""

import datetime
import hashlib
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from speechlm2_jax import settings
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.object_store.folders import shown

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "jiwer", "whisper-normalizer")
_WEIGHTS = (".safetensors", ".json", ".ckpt", ".nemo", ".bin", ".distcp", ".model", ".yaml")


def provenance(
    config: EvalConfig | DuplexEvalConfig,
    device: jax.Device,
    totals: dict[str, object],
    *,
    sha256: str | None,
    step: int | None = None,
) -> dict[str, Any]:
    """Everything needed to reproduce the rows, as plain values.

    `sha256` is the model's `fingerprint`, `step` that of a run.
    """
    import speechlm2_jax

    versions = {"python": platform.python_version(), "speechlm2_jax": speechlm2_jax.__version__}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "model": {
            "name": shown(Path(config.pretrained_name)),
            "sha256": sha256,
            **({} if step is None else {"step": step}),
        },
        "inputs": config.inputs,
        "device": {"platform": device.platform, "kind": device.device_kind},
        "dtype": config.dtype,
        "settings": settings.to_plain(config),
        "versions": versions,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "totals": totals,
    }


def fingerprint(name: str) -> str | None:
    """SHA-256 over names and contents of a model's files; None if the model is not on this machine.

    Equal folders have equal fingerprints, whatever their paths.
    """
    root = Path(name).expanduser()
    if root.is_file():
        files = [root]
    elif root.is_dir():
        files = sorted(p for p in root.rglob("*") if _is_weight(p, root))
    else:
        return None
    digest = hashlib.sha256()
    for path in files:
        digest.update(str(path.relative_to(root) if root.is_dir() else path.name).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _is_weight(path: Path, root: Path) -> bool:
    # array files of an Orbax checkpoint have no suffix; everything below checkpoints/ counts
    inside = "checkpoints" in path.relative_to(root).parts
    return path.is_file() and (inside or path.suffix in _WEIGHTS)
