# pyright: basic
"""Opens whatever holds weights: files, directories, shards. torch is not needed for any."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from speechlm2_jax.conversion.errors import ConversionError, MissingWeightsError, listed
from speechlm2_jax.conversion.readers.distributed import (
    is_distributed,
    lightning_file,
    read_distributed,
)
from speechlm2_jax.conversion.readers.gguf import GgufFile, read_gguf
from speechlm2_jax.conversion.readers.json_text import read_json
from speechlm2_jax.conversion.readers.kinds import (
    GGUF_SUFFIX,
    check_file,
    folder_problem,
    suffix_problem,
)
from speechlm2_jax.conversion.readers.nemo import NemoArchive, read_nemo
from speechlm2_jax.conversion.readers.safetensors_files import (
    read_safetensors,
    write_safetensors,
    write_source,
)
from speechlm2_jax.conversion.readers.source import (
    Index,
    LazySource,
    TensorInfo,
    TensorSource,
    memory_source,
)
from speechlm2_jax.conversion.readers.torch_files import read_torch_file

__all__ = [
    "GgufFile",
    "Index",
    "LazySource",
    "NemoArchive",
    "TensorInfo",
    "TensorSource",
    "check_file",
    "find_gguf",
    "folder_problem",
    "is_distributed",
    "lightning_file",
    "memory_source",
    "open_weights",
    "read_gguf",
    "read_json",
    "read_nemo",
    "write_safetensors",
    "write_source",
]

INDEX_SUFFIX = ".index.json"
DIRECTORY_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ADAPTER = "adapter_config.json"
FILE_READERS: dict[str, Callable[[Path], LazySource]] = {
    ".safetensors": read_safetensors,
    ".bin": read_torch_file,
    ".ckpt": read_torch_file,
    ".pt": read_torch_file,
    ".pth": read_torch_file,
    ".nemo": lambda path: read_nemo(path).weights,
    GGUF_SUFFIX: lambda path: read_gguf(path).weights,
}


def open_weights(path: Path | str) -> LazySource:
    """Opens a weights file, a shard index, or a directory that has one, to be read lazily.

    A directory may also be a torch distributed checkpoint.

    Raises MissingWeightsError for a directory without any, ConversionError for what cannot be
    read, UnsafeFileError for a hostile file.
    """
    path = Path(path)
    return replace(_open(path), where=str(path))


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that `path` is, or that a directory without other weights holds; else None."""
    if path.is_file():
        return path if path.suffix == GGUF_SUFFIX else None
    if not path.is_dir() or any((path / name).is_file() for name in DIRECTORY_FILES):
        return None
    found = sorted(path.glob(f"*{GGUF_SUFFIX}"))
    return found[0] if len(found) == 1 else None


def _open(path: Path) -> LazySource:
    if path.is_dir():
        found = [path / name for name in DIRECTORY_FILES if (path / name).is_file()]
        if not found and is_distributed(path):
            return read_distributed(path)
        if not found:
            if (file := find_gguf(path)) is not None:
                return _open_file(file)
            if problem := folder_problem(path):
                raise ConversionError(problem)
            expected = ", ".join(DIRECTORY_FILES)
            raise MissingWeightsError(f"{path} has no weights: none of {expected}")
        if (path / ADAPTER).is_file():
            raise ConversionError(
                f"{path} has an adapter (PEFT) beside its weights, so that one changes the other; "
                f"merge it first (PEFT: model.merge_and_unload()), or delete {ADAPTER}"
            )
        path = found[0]
    if not path.is_file():
        raise ConversionError(f"{path} does not exist")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_shards(path)
    return _open_file(path)


def _open_file(path: Path) -> LazySource:
    if path.suffix not in FILE_READERS:
        raise ConversionError(
            suffix_problem(path) or f"{path} is none of {', '.join(FILE_READERS)}"
        )
    check_file(path)
    return FILE_READERS[path.suffix](path)


def _open_shards(index: Path) -> LazySource:
    """Joins the shards of an index. They must hold exactly the tensors that it lists."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ConversionError(f"{index}: has no weight_map of tensor names to file names")
    shards: dict[str, LazySource] = {}
    for name in sorted(set(places.values())):
        suffix = Path(name).suffix
        if Path(name).name != name or suffix not in (".safetensors", ".bin"):
            raise ConversionError(f"{index}: {name!r} is not a weights file beside the index")
        shards[name] = _open_file(index.parent / name)
    stored = {(tensor, name) for name, shard in shards.items() for tensor in shard.infos}
    # a tied tensor may be listed under each of its names and stored once
    further = {(alias, name) for name, shard in shards.items() for alias in shard.aliases}
    listing = set(places.items())
    wrong = {tensor for tensor, _ in (stored - listing) | (listing - stored - further)}
    if wrong:
        raise ConversionError(
            f"{index}: the shards do not hold the tensors that it lists: {listed(wrong)}"
        )
    aliases = {k: v for shard in shards.values() for k, v in shard.aliases.items()}
    return LazySource(
        {tensor: shards[name].infos[tensor] for tensor, name in stored},
        lambda tensor, part: shards[places[tensor]].read(tensor, part),
        {k: v for k, v in aliases.items() if (k, places.get(k)) not in stored},
        fetch_into=lambda tensor, out: shards[places[tensor]].read_into(tensor, out),
    )
