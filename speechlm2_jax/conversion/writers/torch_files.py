"""Writes tensors as torch.save does, for torch.load: a zip archive of a pickle and storages."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.stored_tensor import DTYPES, STORAGES
from speechlm2_jax.conversion.readers.torch_files import LOCAL_HEADER_BYTES
from speechlm2_jax.conversion.writers import pickle_text
from speechlm2_jax.conversion.writers.files import replacing

FOLDER = "archive/"
FORMAT_VERSION = b"3\n"
ALIGNMENT_BYTES = 64
"""torch maps storages into memory, so each begins at a multiple of this."""
PADDING_FIELD = b"FB"
FIELD_HEADER_BYTES = 4
ZIP64_FIELD_BYTES = 20
"""What sizes beyond 2 GiB add to a header."""
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The earliest date of a zip archive: equal tensors give equal bytes."""
STORAGE_CLASSES = {
    DTYPES[dtype]: name for name, dtype in STORAGES.items() if name != "UntypedStorage"
}


def write_torch_file(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict in order; the file appears whole or not at all.

    Names that hold one and the same array (tied weights) share one storage, as in torch. Equal
    tensors give equal bytes. Raises ConversionError, naming it, for an array whose dtype torch's
    files cannot hold.
    """
    storages: dict[str, np.ndarray] = {}
    keys: dict[int, str] = {}
    values: list[tuple[str, bytes]] = []
    for name, array in state.items():
        if array.dtype not in STORAGE_CLASSES:
            known = ", ".join(map(str, STORAGE_CLASSES))
            raise ConversionError(f"{name} is {array.dtype}; torch files hold {known}")
        key = keys.setdefault(id(array), str(len(keys)))
        storages[key] = array
        values.append(
            (name, pickle_text.tensor(STORAGE_CLASSES[array.dtype], key, array.shape)),
        )
    with replacing(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        _add(archive, "data.pkl", memoryview(pickle_text.ordered_dict(values)))
        _add(archive, "byteorder", memoryview(b"little"))
        for key, array in storages.items():
            _add(archive, f"data/{key}", _bytes(array))
        _add(archive, "version", memoryview(FORMAT_VERSION))


def _bytes(array: np.ndarray) -> memoryview:
    """The elements in C order, without a copy if they are so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _add(archive: zipfile.ZipFile, name: str, content: memoryview) -> None:
    """Writes an uncompressed member whose content begins at a multiple of the alignment."""
    assert archive.fp is not None
    info = zipfile.ZipInfo(FOLDER + name, EPOCH)
    info.create_system = 3  # Unix, on every machine
    is_large = content.nbytes > zipfile.ZIP64_LIMIT
    header_bytes = LOCAL_HEADER_BYTES + len(info.filename) + FIELD_HEADER_BYTES
    start = archive.fp.tell() + header_bytes + (ZIP64_FIELD_BYTES if is_large else 0)
    padding = -start % ALIGNMENT_BYTES
    info.extra = struct.pack("<2sH", PADDING_FIELD, padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=is_large) as member:
        member.write(content)
