"""Rows of new sequences into the slots of a batch, on one device or on a mesh."""

import jax
from jaxtyping import Array, Int, Shaped


def put_rows(
    kept: Shaped[Array, "..."], new: Shaped[Array, "..."], at: Int[Array, "G P"], axis: int = 0
) -> Shaped[Array, "..."]:
    """Copies rows into a batch of G groups, each row into its own group's part.

    `axis` is the batch axis: G x R rows of `kept`, G x P of `new`. `at` are rows within a group;
    those beyond the last are dropped. The further axes of `new` may be shorter. With a group for
    each data-parallel device no row leaves its device.
    """
    groups = at.shape[0]

    def by_group(x: Array) -> Array:
        return x.reshape(*x.shape[:axis], groups, -1, *x.shape[axis + 1 :])

    def put(kept: Array, new: Array, at: Array) -> Array:
        further = [slice(0, size) for size in new.shape[axis + 1 :]]
        return kept.at[(*[slice(None)] * axis, at, *further)].set(new, mode="drop")

    if groups == 1:
        return put(kept, new, at[0])
    mapped = jax.vmap(put, in_axes=(axis, axis, 0), out_axes=axis)
    return mapped(by_group(kept), by_group(new), at).reshape(kept.shape)
