"""Any checkpoint's tensors as a safetensors directory or a .nemo file, under their own names."""

import json
from pathlib import Path

from speechlm2_jax.conversion.casting import cast, cast_source
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.gguf import write_directory
from speechlm2_jax.conversion.hf_config import of_plain_weights
from speechlm2_jax.conversion.readers import (
    NemoArchive,
    TensorSource,
    find_gguf,
    open_weights,
    read_json,
    read_nemo,
)
from speechlm2_jax.conversion.readers.nemo import CONFIG as NEMO_CONFIG
from speechlm2_jax.conversion.readers.nemo import WEIGHTS as NEMO_WEIGHTS
from speechlm2_jax.conversion.readers.yaml_text import read_yaml
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.conversion.writers.nemo import references
from speechlm2_jax.conversion.writers.shards import write_shards

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NEMO_SUFFIX = ".nemo"
CONFIG = "config.json"
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "README.md")
"""Files beside the weights of a Hugging Face directory that are kept."""
INDEX_SUFFIX = ".index.json"
MAX_COPIED_BYTES = 1 << 28


def weights_path(target: Path) -> Path:
    """A .nemo file itself, or the weights file or shard index of a directory."""
    if target.suffix == NEMO_SUFFIX:
        return target
    return target / (INDEX if (target / INDEX).exists() else WEIGHTS)


def check_target(target: Path) -> None:
    """Raises ConversionError if `target` has weights already: nothing is overwritten."""
    written = weights_path(target)
    if written.exists():
        raise ConversionError(f"{written} exists; choose another name")
    if target.is_file():
        raise ConversionError(f"{target} is a file; name a directory, or a file that ends in .nemo")


def repack(source: Path, target: Path, dtype: str | None = None) -> None:
    """Writes the tensors of `source` to `target`, and the plain files that stand beside them.

    A `target` that ends in .nemo becomes an archive that NeMo restores; then `source` must hold
    model_config.yaml. Names and shapes stay, and without `dtype` dtypes and values too. A GGUF file
    becomes a directory of Hugging Face (`gguf.write_directory`). Raises ConversionError as the
    readers and `casting.cast` do, and if `target` has weights already.
    """
    check_target(target)
    if target.suffix == NEMO_SUFFIX:
        _write_nemo(source, target, dtype)
    elif (file := find_gguf(source)) is not None:
        write_directory(file, target, dtype)
    elif source.suffix == NEMO_SUFFIX:
        archive = read_nemo(source)
        _write(archive.weights, target, dtype)
        _write_members(archive, target)
    else:
        _write(open_weights(source), target, dtype)
        for name in _kept(source) if source.is_dir() else ():
            (target / name).write_bytes(_plain_file(source / name, dtype))


def _write_nemo(source: Path, target: Path, dtype: str | None) -> None:
    """The way back from what `_write_members` leaves, the user's changes to it included."""
    if source.suffix == NEMO_SUFFIX:
        archive = read_nemo(source)
        config, weights = archive.config, archive.weights
        names = set(archive.members) - {NEMO_CONFIG, NEMO_WEIGHTS}
        files = {name: archive.artifact(name) for name in names}
    elif (source / NEMO_CONFIG).is_file():
        text = _small_file(source / NEMO_CONFIG)
        config = read_yaml(text, str(source / NEMO_CONFIG))
        weights = open_weights(source)
        names = {name for name in references(config) if Path(name).name == name}
        files = {n: _small_file(source / n) for n in names if (source / n).is_file()}
    else:
        raise ConversionError(
            f"{source} has no {NEMO_CONFIG}, which a .nemo file needs; name a directory instead"
        )
    tensors = cast({name: weights.read(name) for name in sorted(weights.infos)}, dtype)
    tied = {alias: tensors[name] for alias, name in weights.aliases.items() if name in tensors}
    write_nemo(target, config, tensors | tied, files)


def _small_file(path: Path) -> bytes:
    if path.stat().st_size > MAX_COPIED_BYTES:
        raise ConversionError(f"{path} has {path.stat().st_size} bytes; {MAX_COPIED_BYTES} at most")
    return path.read_bytes()


def _write(source: TensorSource, target: Path, dtype: str | None) -> None:
    write_shards(target, cast_source(source, dtype))


def _plain_file(path: Path, dtype: str | None) -> bytes:
    """A file's content; config.json of an LLM names the dtype that the weights are cast to."""
    content = _small_file(path)
    if dtype is None or path.name != CONFIG:
        return content
    changed = of_plain_weights(read_json(path), dtype)
    return (json.dumps(changed, indent=2) + "\n").encode()


def _kept(source: Path) -> list[str]:
    """Names of the plain files of a Hugging Face directory, without its weights and their index."""
    found = {path for pattern in COPIED for path in source.glob(pattern) if path.is_file()}
    return sorted(path.name for path in found if not path.name.endswith(INDEX_SUFFIX))


def _write_members(archive: NemoArchive, target: Path) -> None:
    """Writes model_config.yaml and tokenizer files; their names were checked by the tar reader."""
    for name in archive.members:
        if name != NEMO_WEIGHTS:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.artifact(name))
