"""LoRA (Hu et al. 2021) with PEFT's semantics and key names."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Key

from speechlm2_jax.layers.dropout import dropout
from speechlm2_jax.layers.linear import Linear, default_init, zeros
from speechlm2_jax.layers.module import Initializer, Variables, param

TARGET_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "q_proj": "query",
        "k_proj": "key",
        "v_proj": "value",
        "o_proj": "output",
        "gate_proj": "gate",
        "up_proj": "up",
        "down_proj": "down",
        "qkv_proj": "qkv",
        "gate_up_proj": "gate_up",
        "dense": "output",
        "fc1": "up",
        "fc2": "down",
        "c_fc": "up",
        "c_proj": "down",
    }
)
"""PEFT's name of a linear layer -> the attribute that holds it here."""
DEFAULT_TARGETS = ("q_proj", "v_proj")
"""PEFT's default `target_modules` for the supported families."""
ALL = "all-linear"
"""PEFT's name for every linear layer of the decoder except the head."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The supported keys of PEFT's LoraConfig, with PEFT's defaults.

    A saved adapter_config.json is accepted: keys about how it was saved are ignored (`IGNORED`),
    keys of methods other than plain LoRA are refused (`REFUSED`). Raises ValueError for values that
    are not supported.
    """

    IGNORED: ClassVar[Mapping[str, str]] = {
        key: "describes how PEFT saved or loaded an adapter, not what it computes"
        for key in (
            *("peft_type", "peft_version", "inference_mode", "base_model_name_or_path"),
            *("revision", "auto_mapping", "runtime_config", "ensure_weight_tying"),
            "merge_weights",  # of the first versions
        )
    } | {
        "megatron_core": "names Megatron's package, which only megatron_config uses",
        "qalora_group_size": "is the group size of QALoRA, which use_qalora turns on",
    }
    REFUSED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "init_lora_weights": (
            "only PEFT's default initialization is supported; set it to true",
            True,
        ),
        "fan_in_fan_out": ("no model here stores weights transposed; set it to false",),
        "use_dora": ("only plain LoRA is supported; set it to false",),
        "use_qalora": ("only plain LoRA is supported; set it to false",),
        "modules_to_save": ("unfreeze modules with model.prevent_freeze_params; set it to null",),
        "exclude_modules": ("list the adapted layers in target_modules; set it to null",),
        "layers_to_transform": ("every layer is adapted; set it to null",),
        "layers_pattern": ("every layer is adapted; set it to null",),
        "layer_replication": ("layers are not replicated; set it to null",),
        "rank_pattern": ("one rank serves all layers; set it to {}",),
        "alpha_pattern": ("one lora_alpha serves all layers; set it to {}",),
        "megatron_config": ("Megatron is not supported; set it to null",),
        "loftq_config": ("quantized weights are not supported; set it to {}",),
        "eva_config": ("only PEFT's default initialization is supported; set it to null",),
        "corda_config": ("only PEFT's default initialization is supported; set it to null",),
        "lora_ga_config": ("only PEFT's default initialization is supported; set it to null",),
        **dict.fromkeys(
            ("velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
            ("only plain LoRA is supported; set it to null",),
        ),
        "alora_invocation_tokens": ("an adapter acts on all tokens; set it to null",),
        "enable_lora": ("every target is adapted; set it to null",),
        "trainable_token_indices": ("training single tokens is not supported; set it to null",),
        "target_parameters": ("only linear layers are adapted; set it to null",),
        "lora_bias": ("an adapter has no bias; set it to false",),
    }

    task_type: str | None = "CAUSAL_LM"
    """null, PEFT's default, means the same here."""
    r: int = 8
    lora_alpha: int | float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None
    """Names of linear layers (`q_proj` or `self_attn.q_proj`), or `all-linear`."""
    bias: str = "none"
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r."""

    def __post_init__(self) -> None:
        if self.task_type is None:
            object.__setattr__(self, "task_type", "CAUSAL_LM")
        if self.task_type != "CAUSAL_LM":
            raise ValueError(f"lora.task_type={self.task_type!r}: only CAUSAL_LM is supported")
        if self.bias != "none":
            raise ValueError(f"lora.bias={self.bias!r}: only 'none' is supported")
        if self.r < 1:
            raise ValueError(f"lora.r: expected at least 1, got {self.r}")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"lora.lora_dropout: expected a value in [0, 1), got {self.lora_dropout}"
            )
        unknown = sorted(name for name in self._names if _last(name) not in TARGET_NAMES)
        if unknown:
            raise ValueError(
                f"lora.target_modules: unknown layers {unknown}; choose among "
                f"{list(TARGET_NAMES)}, or set it to {ALL!r}"
            )

    @property
    def targets(self) -> frozenset[str]:
        """Attribute names of the adapted layers in this project."""
        return frozenset(TARGET_NAMES[_last(name)] for name in self._names)

    @property
    def _names(self) -> tuple[str, ...]:
        given = self.target_modules
        if isinstance(given, str):
            return tuple(TARGET_NAMES) if given == ALL else (given,)
        return DEFAULT_TARGETS if given is None else given

    @property
    def scale(self) -> float:
        """Factor of the low-rank update B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def adapts(self, given: str, layer: str) -> bool:
        """Whether a name in `target_modules` names a layer (`self_attn.q_proj`), as in PEFT."""
        return layer == given or layer.endswith(f".{given}")

    @property
    def drops_output(self) -> bool:
        """Whether dropout acts on the adapter's output; PEFT's acts on its input."""
        return False

    @property
    def initializer(self) -> Initializer:
        """Draws the first matrix of a new adapter; the second starts as zeros."""
        # kaiming_uniform(a=sqrt(5)) is U(-1/sqrt(in), 1/sqrt(in))
        return default_init

    def as_peft(self) -> "LoraConfig":
        """The adapter as PEFT describes it."""
        return self


def _last(name: str) -> str:
    return name.rpartition(".")[2]


class LoraLinear(Linear):
    """y = x Wᵀ + b + scale * dropout(x) Aᵀ Bᵀ; without `lora`, a plain Linear.

    NeMo Automodel may apply the dropout to the whole last term instead (`drops_output`).
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        bias: bool = False,
        init: Initializer = default_init,
        lora: LoraConfig | None = None,
    ):
        super().__init__(d_in, d_out, axes=axes, rngs=rngs, bias=bias, init=init)
        self.lora = lora
        if lora is None:
            self.lora_a = self.lora_b = None
            return
        self.lora_a = param(rngs, (lora.r, d_in), ("rank", axes[1]), lora.initializer)
        self.lora_b = param(rngs, (d_out, lora.r), (axes[0], "rank"), zeros)

    def __call__(
        self, x: Float[Array, "B T d_in"], rngs: Key[Array, " B"] | None = None
    ) -> Float[Array, "B T d_out"]:
        """Applies the layer; with `rngs`, one per example, the adapter's dropout is on."""
        y = super().__call__(x)
        if self.lora is None or self.lora_a is None or self.lora_b is None:
            return y
        a, b = self.lora_a[...].astype(x.dtype), self.lora_b[...].astype(x.dtype)
        rate = self.lora.lora_dropout
        if self.lora.drops_output:
            return y + dropout(x @ a.T @ b.T * self.lora.scale, rate, rngs)
        return y + dropout(x, rate, rngs) @ a.T @ b.T * self.lora.scale


def merge_lora(variables: Variables, config: LoraConfig, dtype: str | None = None) -> Variables:
    """Merges every adapter into its weight, W + scale * B A, and removes it.

    The result fits the same network built without LoRA. The sum is computed in fp32 on the host and
    rounded once, to `dtype`, by default that of the weight. Other variables are unchanged.
    """
    merged = {p: v for p, v in variables.items() if not p.endswith(("lora_a", "lora_b"))}
    for path, a in variables.items():
        if not path.endswith("lora_a"):
            continue
        layer = path.removesuffix("lora_a")
        weight, b = np.asarray(variables[layer + "weight"]), np.asarray(variables[layer + "lora_b"])
        made = jnp.dtype(dtype or weight.dtype)
        merged[layer + "weight"] = _merged(weight, np.asarray(a), b, config.scale, made)
    return merged


def _merged(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float, dtype: np.dtype[Any]
) -> np.ndarray:
    """W + scale * B A of one layer, or of each layer of a stack in turn."""
    if weight.ndim > 2:
        made = np.empty(weight.shape, dtype)
        for layer in range(len(weight)):
            made[layer] = _merged(weight[layer], a[layer], b[layer], scale, dtype)
        return made
    update = b.astype(np.float32) @ a.astype(np.float32)  # [out, in]
    return (weight.astype(np.float32) + update * np.float32(scale)).astype(dtype)
