"""Names of wrappers (torch.compile, DistributedDataParallel, PEFT, FSDP) taken off tensor names."""

from collections.abc import Iterable, Mapping

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.source import Index, LazySource, TensorSource

ANYWHERE = (
    "_orig_mod.",  # torch.compile
    "_fsdp_wrapped_module.",  # FullyShardedDataParallel
    "_checkpoint_wrapped_module.",  # activation checkpointing
)
"""What stands inside names, before any module."""
LEADING = ("module.", "base_model.model.", "model.")
"""What may stand before every name: DistributedDataParallel, PEFT, a module of one's own."""


def unwrapped(source: TensorSource, accepted: Iterable[str]) -> TensorSource:
    """The same tensors by the names that a table accepts, where wrappers alone keep them from it.

    A leading wrapper is taken off only where every name has it and no name fits as it is. Raises
    ConversionError if two tensors would then have one name.
    """
    known = frozenset(accepted)
    given = [*source.infos, *source.aliases]
    names = {name: _without_inner(name) for name in given}
    while not known & set(names.values()):
        wrapper = next((w for w in LEADING if all(n.startswith(w) for n in names.values())), None)
        if wrapper is None or not names:
            return source  # nothing fits: errors name the tensors as they are stored
        names = {name: inner.removeprefix(wrapper) for name, inner in names.items()}
    if all(name == inner for name, inner in names.items()):
        return source
    return _renamed(source, names)


def _without_inner(name: str) -> str:
    for wrapper in ANYWHERE:
        name = name.replace(wrapper, "")
    return name


def _renamed(source: TensorSource, names: Mapping[str, str]) -> TensorSource:
    stored: dict[str, str] = {}
    for name, inner in names.items():
        if stored.setdefault(inner, name) != name:
            raise ConversionError(
                f"{stored[inner]} and {name} are both {inner} without their wrappers; delete one"
            )

    def fetch(name: str, index: Index | None) -> np.ndarray:
        return source.read(stored[name], index)

    return LazySource(
        {names[name]: info for name, info in source.infos.items()},
        fetch,
        {names[alias]: names.get(name, name) for alias, name in source.aliases.items()},
        fetch_into=lambda name, out: source.read_into(stored[name], out),
    )
