"""Speech language models on TPU and GPU, in JAX.

The faces below resolve on first use: importing the package loads no framework beyond Python's own
and touches no device, so the model half runs where only the JAX stack is installed.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_FACES = {
    "models": ("speechlm2_jax.models", None),
    "data": ("speechlm2_jax.data", None),
    "modules": ("speechlm2_jax.modules", None),
    "Trainer": ("speechlm2_jax.user_trainer", "Trainer"),
    "ModelParallelStrategy": ("speechlm2_jax.training.trainer", "ModelParallelStrategy"),
    "text_normalizer": ("speechlm2_jax.evaluation.metrics.wer", "text_normalizer"),
    "exp_manager": ("speechlm2_jax.training.trainer", "exp_manager"),
}

__all__ = [
    "Trainer",
    "ModelParallelStrategy",
    "data",
    "exp_manager",
    "models",
    "modules",
    "text_normalizer",
]  # noqa: F822


def __getattr__(name: str) -> Any:
    if name not in _FACES:
        raise AttributeError(f"module 'speechlm2_jax' has no attribute {name!r}")
    module_name, attribute = _FACES[name]
    module = importlib.import_module(module_name)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
