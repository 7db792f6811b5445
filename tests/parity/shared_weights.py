"""Recorded weights that two files have in common, of which tests/data keeps one copy."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

SPEECH_DECODER = Path(__file__).parents[1] / "data" / "speech_decoder"
SHARING = {"module_cfg": "module_no_prev_audio", "module_input_proj": "module_no_prev_audio"}
"""Speech decoders, and the one in whose file the weights lie that they have in common."""


def load_with_shared(path: Path, shared: Path, prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors of a file, and those of `shared` below `prefix` that it does not have itself."""
    common = {k: v for k, v in load_file(shared).items() if k.startswith(prefix)}
    return common | load_file(path)


def speech_decoder_tensors(name: str) -> dict[str, np.ndarray]:
    """What is recorded of a speech decoder or its transformer, weights (`sd/`) included."""
    path = SPEECH_DECODER / f"{name}.safetensors"
    if name not in SHARING:
        return load_file(path)
    return load_with_shared(path, SPEECH_DECODER / f"{SHARING[name]}.safetensors", "sd/")
