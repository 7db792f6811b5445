"""`model.init_from_checkpoint` of a CTC model: a new training starts from trained weights."""

import logging
from typing import TYPE_CHECKING

import jax
import numpy as np

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.pretrained.errors import errors_name_key
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:
    from speechlm2_jax.models.ctc import CTCModel

KEY = "model.init_from_checkpoint"
HEAD = "head."
_log = logging.getLogger(__name__)


def read(name: str, model: "CTCModel") -> Variables:
    """The weights and buffers of a `.nemo` file or a run, for a model of the same sizes.

    Without those of the head, and with a warning, if the tokenizers differ: its rows belong to
    other pieces. Raises SettingsError for what is no CTC model or has other shapes.
    """
    with errors_name_key(KEY):
        other = type(model).from_pretrained(name)
    found = dict(other.variables)
    if other.tokenizer.contents != model.tokenizer.contents:
        _log.warning("%s: %s has another tokenizer; the head starts at random", KEY, name)
        found = {path: value for path, value in found.items() if not path.startswith(HEAD)}
    unlike = [
        path
        for path, info in model.infos.items()
        if (path in found or not path.startswith(HEAD))
        and (path not in found or found[path].shape != info.shape)
    ]
    if unlike:
        shape = found[unlike[0]].shape if unlike[0] in found else "none"
        raise SettingsError(
            f"{KEY}: {name} does not fit: {unlike[0]} has the shape {shape} there and "
            f"{model.infos[unlike[0]].shape} here ({len(unlike)} such); set the model's sizes to "
            "those of the checkpoint"
        )
    return found


def placed(value: AnyArray | None, initial: AnyArray) -> AnyArray:
    """A loaded value with the dtype and sharding of the initial one, which it replaces."""
    if value is None:
        return initial
    whole = np.asarray(value, initial.dtype)
    if not isinstance(initial, jax.Array):
        return whole
    return jax.make_array_from_callback(whole.shape, initial.sharding, lambda index: whole[index])
