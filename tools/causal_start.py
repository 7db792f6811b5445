"""A causal encoder that starts from the weights of one with full context.

What has the same name and shape is taken over. A causal convolution of the subsampling looks one
frame and one band further back than a centred one: after its three strides of 2, frame and band i
lie where i - 7/8 lay, so the projection's bands move up by one. The mel bands, which `per_feature`
would bring to mean 0 and deviation 1, are so on average by the first convolution's own weights.
"""

from pathlib import Path
from typing import Any

import numpy as np

from speechlm2_jax import settings
from speechlm2_jax.models.ctc import CTCModel

SUBSAMPLING = "encoder.subsampling."
LOG_MEL_MEAN, LOG_MEL_DEVIATION = -12.0, 3.5
"""Of natural-log mel energies of the training speech, over all bands."""


def causal_start(full: CTCModel, tokenizer: Path, overlay: Path, archive: Path) -> Path:
    """Writes the untrained causal model's `.nemo` archive and returns its path.

    `tokenizer` is the folder of the full model's, `overlay` the YAML whose `model:` block is laid
    over that model's.
    """
    block = settings.load(overlay, complete=False)["model"]
    cfg: dict[str, Any] = dict(full.cfg)
    for key, value in block.items():
        cfg[key] = {**cfg[key], **value}
    causal = CTCModel({**cfg, "tokenizer": {"dir": str(tokenizer)}})
    values = dict(causal.variables)
    for path, info in causal.infos.items():
        found = full.variables.get(path)
        if found is not None and found.shape == info.shape:
            values[path] = np.asarray(found, info.dtype)
    _move_bands(values, full)
    _normalize_in_first(values)
    causal.variables = values
    causal.save_to(archive)
    return archive


def _move_bands(values: dict, full: CTCModel) -> None:
    """The projection of C channels by F bands to the width: one band more, and all one higher."""
    path = f"{SUBSAMPLING}output.weight"
    old = np.asarray(full.variables[path])
    channels = len(values[f"{SUBSAMPLING}conv_in.bias"])
    old = old.reshape(len(old), channels, -1)
    new = np.pad(old, ((0, 0), (0, 0), (1, 0)))
    assert new[0].size == values[path].shape[1], "one band more than the centred subsampling has"
    values[path] = new.reshape(len(old), -1).astype(values[path].dtype)


def _normalize_in_first(values: dict) -> None:
    weight = np.asarray(values[f"{SUBSAMPLING}conv_in.weight"]) / LOG_MEL_DEVIATION
    bias = np.asarray(values[f"{SUBSAMPLING}conv_in.bias"])
    values[f"{SUBSAMPLING}conv_in.weight"] = weight
    values[f"{SUBSAMPLING}conv_in.bias"] = bias - LOG_MEL_MEAN * weight.sum(axis=(1, 2, 3))
