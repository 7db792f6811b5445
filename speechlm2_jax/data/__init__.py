"""Host side, NumPy: from manifests and audio files to batches of static shape.

The names below resolve on first use, so that a model may import the tokenizer or the prompts
without loading Lhotse or Grain.
"""

import importlib
from typing import Any

_FACES = {
    "AudioError": "speechlm2_jax.data.audio",
    "Conversation": "speechlm2_jax.data.conversations",
    "DataModule": "speechlm2_jax.data.datamodule",
    "DuplexS2SDataset": "speechlm2_jax.data.duplex.dataset",
    "DuplexSTTDataset": "speechlm2_jax.data.duplex.stt_dataset",
    "PromptFormatter": "speechlm2_jax.data.prompts",
    "SALMDataset": "speechlm2_jax.data.salm_dataset",
    "Tokenizer": "speechlm2_jax.data.tokenizer",
}

__all__ = sorted(_FACES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _FACES:
        raise AttributeError(f"module 'speechlm2_jax.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_FACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
