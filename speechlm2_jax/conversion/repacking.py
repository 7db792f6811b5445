"""Any checkpoint's tensors as a safetensors directory, under the names they have."""

from pathlib import Path

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import (
    NemoArchive,
    TensorSource,
    open_weights,
    read_json,
    read_nemo,
    write_safetensors,
)
from speechlm2_jax.conversion.readers.nemo import WEIGHTS as NEMO_WEIGHTS
from speechlm2_jax.conversion.readers.torch_files import read_hyper_parameters

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
SPEECH_MODEL_KEYS = frozenset(("pretrained_llm", "perception"))
COPIED = (CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""What stands beside the weights of a Hugging Face directory and is kept."""
MAX_COPIED_BYTES = 1 << 28


def is_speech_model(source: Path) -> bool:
    """True for what `models` loads whole: a run, a saved or NeMo directory, a Lightning .ckpt.

    Anything else is converted tensor by tensor.
    """
    if source.is_dir():
        if (source / "checkpoints").is_dir():
            return True
        config = source / CONFIG
        return config.is_file() and read_json(config).keys() >= SPEECH_MODEL_KEYS
    if source.suffix != ".ckpt" or not source.is_file():
        return False
    cfg = read_hyper_parameters(source).get("cfg")
    return isinstance(cfg, dict) and cfg.keys() >= SPEECH_MODEL_KEYS


def check_target(target: Path) -> None:
    """Raises ConversionError if `target` has weights already: nothing is overwritten."""
    if target.exists() and not target.is_dir():
        raise ConversionError(f"{target} is a file; name a directory")
    if (target / WEIGHTS).exists():
        raise ConversionError(f"{target / WEIGHTS} exists; name another directory")


def repack(source: Path, target: Path) -> None:
    """Writes the tensors of `source` to `target`, and the plain files that stand beside them.

    Names, shapes, dtypes and values stay. Raises ConversionError as the readers do, and if
    `target` has weights already.
    """
    check_target(target)
    if source.suffix == ".nemo":
        archive = read_nemo(source)
        _write(archive.weights, target)
        _write_members(archive, target)
        return
    _write(open_weights(source), target)
    for name in COPIED if source.is_dir() else ():
        beside = source / name
        if beside.is_file() and beside.stat().st_size <= MAX_COPIED_BYTES:
            (target / name).write_bytes(beside.read_bytes())


def _write(source: TensorSource, target: Path) -> None:
    tensors = {name: source.read(name) for name in source.infos}
    write_safetensors(target / WEIGHTS, tensors, {"format": "pt", **source.aliases})


def _write_members(archive: NemoArchive, target: Path) -> None:
    """Writes model_config.yaml and tokenizer files; their names were checked by the tar reader."""
    for name in archive.members:
        if name != NEMO_WEIGHTS:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.artifact(name))
