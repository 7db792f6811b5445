"""Initial values of a network's variables."""

from collections.abc import Callable, Mapping

import jax

from speechlm2_jax.layers.cpu import fast_compile_options
from speechlm2_jax.layers.module import Variables


def draw(
    make: Callable[[], Variables], layout: Mapping[str, jax.ShapeDtypeStruct] | None = None
) -> Variables:
    """Computes initial values in one jitted program; it runs once, so it is compiled quickly.

    With `layout` each value gets the dtype and the sharding of its entry.
    """
    options = fast_compile_options()
    if layout is None:
        return dict(jax.jit(make, compiler_options=options)())

    def cast() -> Variables:
        return {path: value.astype(layout[path].dtype) for path, value in make().items()}

    shardings = {path: layout[path].sharding for path in jax.eval_shape(make)}
    return dict(jax.jit(cast, out_shardings=shardings, compiler_options=options)())
