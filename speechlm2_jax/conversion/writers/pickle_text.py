"""The pickle inside a torch file, written opcode by opcode: an OrderedDict of tensors.

Protocol 2, the one that torch.save writes. A tensor is a call of torch._utils._rebuild_tensor_v2
with the id of a storage, which lies outside the pickle, and the tensor's place in it.
"""

import math
import pickle
import struct
from collections.abc import Iterable

PROTOCOL = 2


def ordered_dict(items: Iterable[tuple[str, bytes]]) -> bytes:
    """A whole pickle: the names and the opcodes of their values."""
    pairs = b"".join(_text(name) + value for name, value in items)
    return b"".join(
        (
            pickle.PROTO + bytes([PROTOCOL]),
            EMPTY_ORDERED_DICT,
            pickle.MARK + pairs + pickle.SETITEMS,
            pickle.STOP,
        )
    )


def tensor(storage_class: str, key: str, shape: tuple[int, ...]) -> bytes:
    """A contiguous tensor that takes all of the storage `key`, whose class is torch's."""
    storage = _group(
        _text("storage"),
        _global("torch", storage_class),
        _text(key),
        _text("cpu"),
        _integer(math.prod(shape)),
    )
    arguments = _group(
        storage + pickle.BINPERSID,
        _integer(0),
        _group(*map(_integer, shape)),
        _group(*map(_integer, _strides(shape))),
        pickle.NEWFALSE,  # requires_grad
        EMPTY_ORDERED_DICT,  # hooks
    )
    return _global("torch._utils", "_rebuild_tensor_v2") + arguments + pickle.REDUCE


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements between neighbours of each axis; torch counts an empty axis as one long."""
    return tuple(math.prod(max(1, n) for n in shape[axis + 1 :]) for axis in range(len(shape)))


def _group(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode("ascii")


def _text(value: str) -> bytes:
    content = value.encode()
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def _integer(value: int) -> bytes:
    """BININT holds 31 bits and a sign; beyond them LONG1."""
    if value < 1 << 31:
        return pickle.BININT + struct.pack("<i", value)
    content = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(content)]) + content


EMPTY_ORDERED_DICT = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
