"""Arrays in 8 bits: int8 or fp8 values with one scale for each row.

A row is what shares a scale: the inputs of one output channel of a weight [out, in], one row of an
embedding table, the key or the value of one token and head. Symmetric quantization: x is about
values * scale, and the largest magnitude of a row becomes the largest value of the dtype. A matmul
multiplies its result by the scales of the output channels, so the weight itself is only cast
(Dettmers et al. 2022, LLM.int8(), without its outliers).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

INT8, FP8 = "int8", "fp8"
LARGEST: Mapping[Any, float] = MappingProxyType(
    {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
)
"""Dtype of quantized values -> the largest value that is used; int8 leaves -128 out."""
DTYPES: Mapping[str, Any] = MappingProxyType(dict(zip((INT8, FP8), LARGEST, strict=True)))
"""What a user writes -> the dtype of the values."""
SCALE_DTYPE = jnp.bfloat16
"""Dtype of the scales of weights. Values are rounded with the scale as it is stored, so a coarse
scale adds no error."""
FP8_DEVICES = ("TPU7x", "TPU v7")
"""Start of the `device_kind` of TPUs that compute in fp8."""
FP8_COMPUTE_CAPABILITY = 8.9
"""GPUs from this on compute in fp8 (Ada, Hopper, Blackwell)."""


class QuantizedArray(NamedTuple):
    """An array in 8 bits. Slices and gathers that leave the last axis alone act on both fields."""

    values: Array
    """[..., width] in int8 or fp8."""
    scales: Float[Array, "..."]
    """[..., 1]; for a KV cache their dtype is that of the activations."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array that this stands for."""
        return self.values.shape


Heads = Float[Array, "B S N_kv H"] | QuantizedArray
"""Keys or values of one layer."""


def is_quantized(value: Any) -> bool:
    """Whether an array holds quantized values: no weight has these dtypes otherwise."""
    return value.dtype in LARGEST


def quantize(x: Float[Array, "..."], dtype: DTypeLike, scale_dtype: DTypeLike) -> QuantizedArray:
    """Quantizes along the last axis; a row of zeros has the scale 0."""
    largest = LARGEST[jnp.dtype(dtype)]
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / largest
    scales = scales.astype(scale_dtype)
    divisor = jnp.where(scales > 0, scales, 1).astype(jnp.float32)
    # a scale that was rounded down would put the largest value beyond the range
    values = jnp.clip(wide / divisor, -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        values = jnp.rint(values)
    return QuantizedArray(values.astype(dtype), scales)


def dequantize(x: QuantizedArray, dtype: DTypeLike) -> Float[Array, "..."]:
    """The array that `x` stands for, in `dtype`."""
    return x.values.astype(dtype) * x.scales.astype(dtype)


def like(x: Float[Array, "..."], stored: Array | QuantizedArray) -> Array | QuantizedArray:
    """An array in the form of a part of a KV cache that it is written to."""
    if isinstance(stored, QuantizedArray):
        return quantize(x, stored.values.dtype, stored.scales.dtype)
    return x


def fp8_problem(device: Any) -> str | None:
    """Why fp8 is no use on a `jax.Device`; None if it is. A CPU runs it, to judge its accuracy."""
    capability = str(getattr(device, "compute_capability", "0"))
    is_fit = {
        "cpu": True,
        "gpu": float(capability if capability.replace(".", "", 1).isdigit() else 0)
        >= FP8_COMPUTE_CAPABILITY,
        "tpu": device.device_kind.startswith(FP8_DEVICES),
    }
    if is_fit.get(device.platform, False):
        return None
    return f"{device.device_kind} does not compute in fp8, so it would be slower; use {INT8}"
