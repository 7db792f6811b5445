# pyright: basic
"""Reads torch's distributed checkpoints (`.metadata` and `*.distcp`) without torch.

This is the folder that torch.distributed.checkpoint.save writes, so FSDP, and Lightning with
ModelParallelStrategy, which adds `meta.pt` with all that is no tensor. A tensor is stored in
chunks, one per device that holds a part of it; each is what torch.save makes of one tensor.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError, listed
from speechlm2_jax.conversion.readers.buffers import map_file
from speechlm2_jax.conversion.readers.distributed_metadata import (
    ChunkedTensor,
    StoredChunk,
    read_metadata,
)
from speechlm2_jax.conversion.readers.source import Index, LazySource, TensorInfo, extent
from speechlm2_jax.conversion.readers.stored_tensor import StoredTensor
from speechlm2_jax.conversion.readers.torch_files import read_torch_object

METADATA = ".metadata"
LIGHTNING = "meta.pt"
"""Lightning's file with hyper_parameters, epoch and callbacks."""
STATE_DICT = "state_dict."
"""Before the names of a Lightning checkpoint's weights; other entries are the optimizer's."""


def is_distributed(folder: Path) -> bool:
    """Whether a folder is a torch distributed checkpoint."""
    return (folder / METADATA).is_file()


def read_distributed(folder: Path) -> LazySource:
    """Opens a folder as tensors that are read when asked for; of a Lightning one, the weights.

    A part of a tensor reads only the chunks that it touches. Raises UnsafeFileError for a hostile
    file, ConversionError for one that is damaged or holds more than tensors.
    """
    try:
        entries = read_metadata(folder / METADATA)
    except ConversionError as error:
        raise type(error)(
            f"{folder}, a torch distributed checkpoint: {METADATA}: {error}"
        ) from error
    if any(name.startswith(STATE_DICT) for name in entries):
        entries = {
            name.removeprefix(STATE_DICT): entry
            for name, entry in entries.items()
            if name.startswith(STATE_DICT)
        }
    other = [name for name, entry in entries.items() if entry is None]
    if other:
        raise ConversionError(f"{folder}: these entries are no tensors: {listed(other)}")
    tensors = {name: entry for name, entry in entries.items() if entry is not None}
    files = _Files(folder, [chunk for tensor in tensors.values() for chunk in tensor.chunks])

    def fetch(name: str, index: Index | None) -> np.ndarray:
        return _read(name, tensors[name], index, files)

    return LazySource({name: tensor.info for name, tensor in tensors.items()}, fetch)


def _read(name: str, tensor: ChunkedTensor, index: Index | None, files: "_Files") -> np.ndarray:
    """Assembles a tensor, or a part of it, from its chunks."""
    info = tensor.info
    part = index if index is not None else tuple(slice(0, n) for n in info.shape)
    if any(step.step not in (None, 1) for step in part):
        return np.ascontiguousarray(_read(name, tensor, None, files)[part])
    whole = np.empty(extent(part, info.shape), info.dtype)
    for chunk in tensor.chunks:
        bounds = [
            (max(asked.start, at), min(asked.stop, at + size))
            for asked, at, size in zip(part, chunk.offsets, chunk.sizes, strict=True)
        ]
        if all(low < high for low, high in bounds):
            corners = zip(bounds, chunk.offsets, part, strict=True)
            places = [(low, high, at, asked.start) for (low, high), at, asked in corners]
            own = tuple(slice(low - at, high - at) for low, high, at, _ in places)
            target = tuple(slice(low - start, high - start) for low, high, _, start in places)
            whole[target] = files.chunk(name, chunk, info).read(own)
    return whole


class _Files:
    """The files of a folder, mapped, and the chunks that were opened in them."""

    def __init__(self, folder: Path, chunks: Sequence[StoredChunk]):
        """Raises ConversionError for a file that is missing or too short for its chunks."""
        self._folder = folder
        self._maps = {name: map_file(folder / name) for name in {c.file for c in chunks}}
        self._opened: dict[StoredChunk, StoredTensor] = {}
        for chunk in chunks:
            if chunk.start + chunk.length > len(self._maps[chunk.file]):
                raise ConversionError(f"{folder / chunk.file} is cut short: fetch it again")

    def chunk(self, name: str, chunk: StoredChunk, info: TensorInfo) -> StoredTensor:
        """One chunk of a tensor. Raises ConversionError if it is not what `.metadata` tells."""
        if chunk not in self._opened:
            self._opened[chunk] = self._open(name, chunk, info)
        return self._opened[chunk]

    def _open(self, name: str, chunk: StoredChunk, info: TensorInfo) -> StoredTensor:
        where = f"{self._folder / chunk.file}: {name}"
        content = self._maps[chunk.file][chunk.start : chunk.start + chunk.length]
        stored = read_torch_object(content, where)
        if not isinstance(stored, StoredTensor):
            raise ConversionError(f"{where}: there is no tensor in its place")
        if stored.info != TensorInfo(chunk.sizes, info.dtype):
            raise ConversionError(
                f"{where}: {METADATA} gives its chunk the shape {list(chunk.sizes)} and "
                f"{info.dtype}, but it has {list(stored.shape)} and {stored.dtype}"
            )
        return stored


def lightning_file(path: Path) -> Path | None:
    """The file with the hyper_parameters of a Lightning checkpoint, a file or a folder, if any."""
    if path.is_file():
        return path if path.suffix == ".ckpt" else None
    return path / LIGHTNING if is_distributed(path) and (path / LIGHTNING).is_file() else None
