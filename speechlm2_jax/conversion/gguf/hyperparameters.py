# pyright: basic
"""The keys of a GGUF file that describe the network, closed: each is read, neutral or an error."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from speechlm2_jax.conversion.errors import ConversionError, listed
from speechlm2_jax.conversion.readers import GgufFile
from speechlm2_jax.llm.families.errors import shown

ARCHITECTURE = "general.architecture"
LARGEST = MappingProxyType({"block_count": 1 << 12, "attention.head_count": 1 << 16})
DEFAULT_LARGEST = 1 << 30
Neutral = Callable[[Any], bool]


def _is_zero(value: Any) -> bool:
    return value == 0


def _is_one_or_unset(value: Any) -> bool:
    return value in (0, 1)


def _is_anything(value: Any) -> bool:
    return True


NEUTRAL: Mapping[str, Neutral] = MappingProxyType(
    {
        "tensor_data_layout": _is_anything,  # queries and keys are in the same order in all
        "pooling_type": _is_anything,  # of embedding models; the network is the same
        "attention.causal": bool,
        "attention.clamp_kqv": _is_zero,
        "attention.max_alibi_bias": _is_zero,
        "expert_count": _is_zero,
        "expert_used_count": _is_zero,
        "nextn_predict_layers": _is_zero,
        "logit_scale": _is_one_or_unset,
        "residual_scale": _is_one_or_unset,
        "embedding_scale": _is_one_or_unset,
        "use_parallel_residual": _is_zero,
    }
)
"""Keys below the architecture that no network here reads -> the values that change nothing."""


class Hyperparameters:
    """The keys below `general.architecture`'s name; what nobody read is checked at the end."""

    def __init__(self, file: GgufFile):
        self.where = str(file.path)
        self.architecture = str(file.metadata.get(ARCHITECTURE, ""))
        prefix = f"{self.architecture}."
        self.values = {
            key.removeprefix(prefix): value
            for key, value in file.metadata.items()
            if self.architecture and key.startswith(prefix)
        }
        self.read: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        """A value as it is stored."""
        self.read.add(key)
        return self.values.get(key, default)

    def size(self, key: str, default: int | None = None) -> int:
        """A whole number above 0; a list of equal ones, one per layer, counts as one.

        Raises ConversionError for another value, or if it is missing and has no default.
        """
        value = self.get(key, default)
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]
        if value is None:
            raise self.error(f"{self.name(key)} is missing")
        largest = LARGEST.get(key, DEFAULT_LARGEST)
        if type(value) is not int or not 1 <= value <= largest:
            raise self.error(
                f"{self.name(key)}={shown(value)} should be one whole number, 1 to {largest}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, with as few digits as give the same float32."""
        value = self.get(key, default)
        if value is None:
            raise self.error(f"{self.name(key)} is missing")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise self.error(f"{self.name(key)}={shown(value)} should be a finite number above 0")
        return shortest(value)

    def optional_number(self, key: str) -> float | None:
        """A finite number above 0; None if it is missing or 0, which llama.cpp takes for unset."""
        return self.number(key) if self.get(key) not in (None, 0) else None

    def check_rest(self) -> None:
        """Raises ConversionError for keys that nobody read and that may change the network."""
        wrong = [
            f"{self.name(key)}={shown(value)}"
            for key, value in self.values.items()
            if key not in self.read and not NEUTRAL.get(key, _is_unknown)(value)
        ]
        if wrong:
            raise self.error(
                f"{listed(wrong)}: not supported, so the model would compute something else"
            )

    def name(self, key: str) -> str:
        """The whole key."""
        return f"{self.architecture}.{key}"

    def error(self, problem: str) -> ConversionError:
        """An error that names the file."""
        return ConversionError(f"{self.where}: {problem}")


def _is_unknown(value: Any) -> bool:
    return False


def shortest(value: float) -> float:
    """The number with as few digits as give the same float32: 1e-5, not 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if single == value else float(value)
