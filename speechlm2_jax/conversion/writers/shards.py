"""Writes weights as Hugging Face does: one safetensors file, or shards of 5 GB and their index."""

import json
from collections.abc import Iterator
from pathlib import Path

from speechlm2_jax.conversion.readers.safetensors_files import write_source
from speechlm2_jax.conversion.readers.source import LazySource, TensorSource

MAX_SHARD_BYTES = 5 * 10**9
"""transformers' largest shard (it writes smaller ones by default)."""
STEM = "model"
FORMAT = {"format": "pt"}
"""Metadata without which transformers reads no file."""


def write_shards(
    directory: Path,
    source: TensorSource,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    stem: str = STEM,
) -> list[Path]:
    """Writes STEM.safetensors, or numbered shards with an index; returns the weight files.

    Shards are filled in the order of the source; a tensor above the limit is a shard of its own.
    Aliases are kept as metadata.
    """
    metadata = {**FORMAT, **source.aliases}
    shards = list(_split(source, max_shard_bytes))
    if len(shards) == 1:
        file = directory / f"{stem}.safetensors"
        write_source(file, source, metadata)
        return [file]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        part = LazySource({name: source.infos[name] for name in names}, source.read)
        write_source(directory / file, part, metadata)
        weight_map |= dict.fromkeys(names, file)
    total = sum(info.size_bytes for info in source.infos.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / f"{stem}.safetensors.index.json").write_text(text)
    return [directory / file for file in dict.fromkeys(weight_map.values())]


def _split(source: TensorSource, max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, info in source.infos.items():
        if names and size + info.size_bytes > max_shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += info.size_bytes
    yield names
