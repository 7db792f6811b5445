"""The user-facing model classes: a network with its tokenizer, settings and weights."""

import importlib
from typing import Any

_MODELS = {
    "SALM": "speechlm2_jax.models.salm",
    "SALMWithAsrDecoder": "speechlm2_jax.models.salm_asr_decoder",
    "CTCModel": "speechlm2_jax.models.ctc",
    "DuplexS2SModel": "speechlm2_jax.models.duplex",
    "DuplexS2SSpeechDecoderModel": "speechlm2_jax.models.duplex",
    "DuplexSTTModel": "speechlm2_jax.models.duplex_stt",
    "AudioCodec": "speechlm2_jax.models.codec",
    "ASRModel": "speechlm2_jax.models.asr",
    "DraftLLM": "speechlm2_jax.models.draft_llm",
}

__all__ = [
    "SALM",
    "SALMWithAsrDecoder",
    "ASRModel",
    "AudioCodec",
    "CTCModel",
    "DraftLLM",
    "DuplexS2SModel",
    "DuplexS2SSpeechDecoderModel",
    "DuplexSTTModel",
]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _MODELS:
        raise AttributeError(f"module 'speechlm2_jax.models' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODELS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
