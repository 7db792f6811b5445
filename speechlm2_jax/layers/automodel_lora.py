"""LoRA with the key names and the meaning of NeMo Automodel (`model.use_nemo_automodel: true`)."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import jax

from speechlm2_jax.layers.linear import default_init
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import Initializer

xavier_normal: Initializer = jax.nn.initializers.variance_scaling(
    1.0, "fan_avg", "normal", in_axis=1, out_axis=0
)
"""N(0, 2 / (in + out)) over a [out, in] kernel: torch's xavier_normal_."""
_KERNELS = "chooses among torch's implementations; the result is the same"
_SAMPLE_LAYERS = (0, 1, 7, 10, 31)
"""Layers that a pattern is tried on: it must match all of them, or none."""


@dataclass(frozen=True, kw_only=True)
class AutomodelLoraConfig(LoraConfig):
    """The supported keys of Automodel's PeftConfig, with its defaults; PEFT's names work too.

    Raises ValueError for values that are not supported.
    """

    ALIASES: ClassVar[Mapping[str, str]] = {
        "dim": "r",
        "alpha": "lora_alpha",
        "dropout": "lora_dropout",
    }
    IGNORED: ClassVar[Mapping[str, str]] = {
        "use_triton": _KERNELS,
        "use_memory_efficient_lora": _KERNELS,
        "lora_dtype": "trainer.precision decides the dtype",
        "moe_rank_scaling": "no supported LLM has experts",
    }
    REFUSED: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "match_all_linear": (
            "it adapts the head too, which is not supported; list the layers in target_modules",
        ),
        "exclude_modules": ("list the adapted layers in target_modules; set it to []",),
        "use_dora": ("only plain LoRA is supported; set it to false",),
        "expert_weight_format": ("no supported LLM has experts", "unquantized"),
    }

    lora_alpha: int | float = 32
    target_modules: tuple[str, ...] | str | None = None
    """Names of linear layers (`q_proj`), or patterns of whole paths (`*.mlp.up_proj`). Required."""
    dropout_position: Literal["pre", "post"] = "post"
    """Dropout acts on the adapter's input (pre) or on its output (post)."""
    lora_A_init: str = "xavier"  # noqa: N815  Automodel's name
    """xavier: normal, with variance 2 / (in + r); any other value is PEFT's initialization."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise ValueError("lora.target_modules: name the adapted layers, such as [q_proj]")

    def adapts(self, given: str, layer: str) -> bool:
        """Whether a name or pattern (`*` is any text) of `target_modules` names a layer.

        `layer` is its name inside a decoder layer, as `self_attn.q_proj`. Raises ValueError for a
        pattern that names it in some of the decoder layers only.
        """
        pattern = given if "*" in given or "." in given else f"*.{given}"
        expression = ".*".join(re.escape(part) for part in pattern.split("*"))
        paths = [f"model.layers.{n}.{layer}" for n in _SAMPLE_LAYERS]
        hits = {re.fullmatch(expression, path) is not None for path in paths}
        if len(hits) > 1:
            raise ValueError(
                f"lora.target_modules: {given!r} adapts some layers only; every layer is adapted"
            )
        return hits.pop()

    def as_peft(self) -> LoraConfig:
        """The adapter as PEFT describes it."""
        return LoraConfig(**{f.name: getattr(self, f.name) for f in fields(LoraConfig)})

    @property
    def drops_output(self) -> bool:
        """Whether dropout acts on the adapter's output."""
        return self.dropout_position == "post"

    @property
    def initializer(self) -> Initializer:
        """Draws the first matrix of a new adapter; the second starts as zeros."""
        return xavier_normal if self.lora_A_init == "xavier" else default_init

    @property
    def _names(self) -> tuple[str, ...]:
        # patterns are names once they are fitted to an LLM
        return tuple(name for name in super()._names if "*" not in name)
