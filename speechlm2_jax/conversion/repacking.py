"""Any checkpoint's tensors as a safetensors directory or a .nemo file, under their own names."""

from pathlib import Path

from speechlm2_jax.conversion.casting import cast
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import (
    NemoArchive,
    TensorSource,
    open_weights,
    read_nemo,
    write_safetensors,
)
from speechlm2_jax.conversion.readers.nemo import CONFIG as NEMO_CONFIG
from speechlm2_jax.conversion.readers.nemo import WEIGHTS as NEMO_WEIGHTS
from speechlm2_jax.conversion.readers.yaml_text import read_yaml
from speechlm2_jax.conversion.writers import write_nemo
from speechlm2_jax.conversion.writers.nemo import references

WEIGHTS = "model.safetensors"
NEMO_SUFFIX = ".nemo"
CONFIG = "config.json"
COPIED = (CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json")
"""What stands beside the weights of a Hugging Face directory and is kept."""
MAX_COPIED_BYTES = 1 << 28


def weights_file(target: Path) -> Path:
    """The file that holds the tensors of `target`: a .nemo file itself, or one in a directory."""
    return target if target.suffix == NEMO_SUFFIX else target / WEIGHTS


def check_target(target: Path) -> None:
    """Raises ConversionError if `target` has weights already: nothing is overwritten."""
    written = weights_file(target)
    if written.exists():
        raise ConversionError(f"{written} exists; choose another name")
    if target.is_file():
        raise ConversionError(f"{target} is a file; name a directory, or a file that ends in .nemo")


def repack(source: Path, target: Path, dtype: str | None = None) -> None:
    """Writes the tensors of `source` to `target`, and the plain files that stand beside them.

    A `target` that ends in .nemo becomes an archive that NeMo restores; then `source` must hold
    model_config.yaml. Names and shapes stay, and without `dtype` dtypes and values too. Raises
    ConversionError as the readers and `casting.cast` do, and if `target` has weights already.
    """
    check_target(target)
    if target.suffix == NEMO_SUFFIX:
        _write_nemo(source, target, dtype)
    elif source.suffix == NEMO_SUFFIX:
        archive = read_nemo(source)
        _write(archive.weights, target, dtype)
        _write_members(archive, target)
    else:
        _write(open_weights(source), target, dtype)
        for name in COPIED if source.is_dir() else ():
            if (source / name).is_file():
                (target / name).write_bytes(_small_file(source / name))


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
    tensors = cast({name: source.read(name) for name in source.infos}, dtype)
    write_safetensors(target / WEIGHTS, tensors, {"format": "pt", **source.aliases})


def _write_members(archive: NemoArchive, target: Path) -> None:
    """Writes model_config.yaml and tokenizer files; their names were checked by the tar reader."""
    for name in archive.members:
        if name != NEMO_WEIGHTS:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.artifact(name))
