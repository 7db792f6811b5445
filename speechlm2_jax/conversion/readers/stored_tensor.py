# pyright: basic
"""torch's tensors as files hold them: a view (offset, shape, strides) into a storage of bytes.

These are the only objects that the restricted unpickler makes; the table at the end gives the
names by which pickles ask for them.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.readers.pickle_machine import Builder, Names, OpaqueType
from speechlm2_jax.conversion.readers.source import MAX_RANK, Index, TensorInfo

MAX_EXPANDED_BYTES = 1 << 30
"""A view may repeat its storage's elements (stride 0) up to this size."""

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "uint64": np.dtype(np.uint64),
    "bool": np.dtype(np.bool_),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "UntypedStorage": "uint8",
}


@dataclass(frozen=True)
class StorageType:
    """The element type that a pickle gives a storage."""

    dtype: np.dtype[np.generic]


@dataclass(frozen=True, eq=False)
class Storage:
    """A run of bytes in the file, fetched when a tensor in it is read."""

    key: str
    dtype: np.dtype[np.generic]
    elements: int
    fetch: Callable[[], memoryview]

    @property
    def size_bytes(self) -> int:
        """The bytes that the pickle promises."""
        return self.elements * self.dtype.itemsize

    def bytes(self) -> memoryview:
        """The content. Raises ConversionError if it has not the promised size."""
        content = self.fetch()
        if len(content) != self.size_bytes:
            raise ConversionError(
                f"storage {self.key} has {len(content)} bytes but {self.size_bytes} are declared"
            )
        return content


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that is not read yet; offset and strides count elements."""

    storage: Storage
    dtype: np.dtype[np.generic]
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""
        return TensorInfo(self.shape, self.dtype)

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two views of the same elements of one storage, which are one tensor."""
        return (self.storage.key, self.dtype, self.offset, self.shape, self.strides)

    def read(self, index: Index | None = None) -> np.ndarray:
        """Copies the tensor, or the part that `index` names, out of the file in C order."""
        size = self.dtype.itemsize
        steps = tuple(stride * size for stride in self.strides)
        content, start = self.storage.bytes(), self.offset * size
        if 0 in self.shape:
            content, start = memoryview(bytes(size)), 0
        view = np.ndarray(self.shape, self.dtype, content, start, steps)
        return np.array(view if index is None else view[index], order="C")


def _rebuild(
    storage: object,
    offset: Any,
    shape: Any,
    strides: Any,
    dtype: np.dtype[np.generic] | None = None,
) -> StoredTensor:
    if not isinstance(storage, Storage):
        raise UnsafeFileError("the pickle builds a tensor from something that is no storage")
    numbers = (offset, *_plain(shape), *_plain(strides))
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise UnsafeFileError(f"the pickle builds a tensor of shape {shape}, strides {strides}")
    dtype = dtype or storage.dtype
    count = math.prod(shape)
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if count and (last + 1) * dtype.itemsize > storage.size_bytes:
        raise UnsafeFileError(
            f"a tensor of shape {shape} at offset {offset} reaches beyond its storage "
            f"{storage.key} of {storage.elements} elements"
        )
    if count * dtype.itemsize > max(storage.size_bytes, MAX_EXPANDED_BYTES):
        raise UnsafeFileError(
            f"a tensor of shape {shape} is much larger than its storage of {storage.elements}"
        )
    if not TensorInfo(tuple(shape), dtype).is_plausible:
        raise UnsafeFileError(f"the pickle builds a tensor of shape {shape}, which no tensor has")
    return StoredTensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _plain(numbers: object) -> tuple[Any, ...]:
    if not isinstance(numbers, tuple) or len(numbers) > MAX_RANK:
        raise UnsafeFileError("the pickle builds a tensor whose shape is not a short tuple")
    return numbers


def _rebuild_v2(*arguments: Any) -> StoredTensor:
    """(storage, offset, shape, strides, requires_grad, hooks[, metadata])."""
    if len(arguments) > 6 and arguments[6]:
        raise ConversionError("conjugated or negated views are not supported; save .clone()s")
    return _rebuild(*arguments[:4])


def _rebuild_v3(*arguments: Any) -> StoredTensor:
    """(storage, offset, shape, strides, requires_grad, hooks, dtype[, metadata])."""
    if len(arguments) < 7 or not isinstance(arguments[6], np.dtype):
        raise UnsafeFileError("the pickle builds a tensor of an unknown dtype")
    return _rebuild(*arguments[:4], dtype=arguments[6])


def _only_tensor(value: object, *_: Any) -> StoredTensor:
    """Parameters: the tensor in it; gradients flags, hooks and attributes are dropped."""
    if not isinstance(value, StoredTensor):
        raise UnsafeFileError("the pickle builds a parameter from something that is no tensor")
    return value


def _size(value: object = ()) -> tuple[int, ...]:
    return _plain(value)


def _ordered_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments:
        raise UnsafeFileError("the pickle builds an OrderedDict in an unknown way")
    return OrderedDict()


PLAIN_BUILTINS = (
    "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple "
    "long unicode xrange"  # as protocol 2 spells int, str and range
)
OPAQUE_NAMES = (
    *(f"{m}.{n}" for m in ("builtins", "__builtin__") for n in PLAIN_BUILTINS.split()),
    "_codecs.encode",
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "collections.deque",
    "datetime.datetime",
    "datetime.timedelta",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"numpy.{c}.multiarray.{n}" for c in ("core", "_core") for n in ("_reconstruct", "scalar")),
    "torch.device",
    "torch._C.Generator",
)
OPAQUE_ROOTS = (
    "lightning",
    "lightning_fabric",
    "lightning_utilities",
    "nemo",
    "numpy",
    "omegaconf",
    "pathlib",
    "pytorch_lightning",
    "typing",
)
TORCH_NAMES = Names(
    values={
        "torch._utils._rebuild_tensor": Builder(_rebuild),
        "torch._utils._rebuild_tensor_v2": Builder(_rebuild_v2),
        "torch._utils._rebuild_tensor_v3": Builder(_rebuild_v3),
        "torch._utils._rebuild_parameter": Builder(_only_tensor),
        "torch._utils._rebuild_parameter_with_state": Builder(_only_tensor),
        "torch.Size": Builder(_size),
        "collections.OrderedDict": Builder(_ordered_dict),
        **{f"torch.{name}": dtype for name, dtype in DTYPES.items()},
        **{f"torch.{name}": StorageType(DTYPES[dtype]) for name, dtype in STORAGES.items()},
        "torch.storage.UntypedStorage": StorageType(DTYPES["uint8"]),
        **{name: OpaqueType(name) for name in OPAQUE_NAMES},
    },
    opaque_roots=OPAQUE_ROOTS,
)
"""Tensors and containers; records of what Lightning and NeMo keep beside the weights."""
