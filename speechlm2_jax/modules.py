"""The parts of a model under the names that NeMo's users know, resolved on first use."""

import importlib
from typing import Any

_MODULES = {
    "AudioPerceptionModule": ("speechlm2_jax.perception.perception", "AudioPerception"),
    "TransformerARSpeechDecoder": ("speechlm2_jax.speech_decoder.decoder", "SpeechDecoder"),
}

__all__ = ["AudioPerceptionModule", "TransformerARSpeechDecoder"]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'speechlm2_jax.modules' has no attribute {name!r}")
    module_name, attribute = _MODULES[name]
    return getattr(importlib.import_module(module_name), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
