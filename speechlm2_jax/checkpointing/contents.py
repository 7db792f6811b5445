"""A checksum of array contents, independent of files: does a rebuilt store equal the lost one?"""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from speechlm2_jax.arrays import AnyArray


def are_local(arrays: Mapping[str, AnyArray]) -> bool:
    """Whether this process holds every value."""
    return all(
        not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
        for x in arrays.values()
    )


def contents_of(arrays: Mapping[str, AnyArray]) -> str:
    """The xxh3_128 of names, dtypes, shapes and values, in hex; equal on any mesh.

    Every process must call it, unless the arrays `are_local`.
    """
    checksum = xxhash.xxh3_128()
    for path in sorted(arrays):
        array = arrays[path]
        checksum.update(f"{path} {np.dtype(array.dtype).name} {tuple(array.shape)}\n".encode())
        for part in _parts(array):
            checksum.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
    return checksum.hexdigest()


def _another(array: jax.Array) -> jax.Array:
    """The same values as another object: an array keeps the host copy that was made of it."""
    shards = [shard.data for shard in array.addressable_shards]
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def _parts(array: AnyArray) -> Iterator[np.ndarray]:
    """The values in order, on the host; an array spread over processes one layer at a time."""
    if not isinstance(array, jax.Array):
        yield np.asarray(array)
    elif array.is_fully_addressable:
        yield np.asarray(_another(array))
    elif array.is_fully_replicated:
        yield np.asarray(array.addressable_data(0))
    else:
        # by index: an array of which this process holds a part cannot be iterated over
        layers = [array] if array.ndim <= 2 else (array[n] for n in range(array.shape[0]))
        for part in layers:
            yield np.asarray(multihost_utils.process_allgather(part, tiled=True))
