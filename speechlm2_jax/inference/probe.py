"""One small forward pass through every module of a model, on fixed inputs.

Two models with the same weights give the same outputs, so a written checkpoint is compared with its
source.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from speechlm2_jax.asr.ctc import CtcNetwork
from speechlm2_jax.inference.stages import hidden_states, on_default_device
from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import Variables, abstract, merge, split
from speechlm2_jax.layers.unstacked import LayerViews
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.networks.channels import Channels
from speechlm2_jax.networks.duplex import Duplex, DuplexConfig, DuplexModes
from speechlm2_jax.networks.salm import Salm, SalmConfig
from speechlm2_jax.perception.perception import PerceptionModes

Outputs = dict[str, np.ndarray]
"""Name -> array."""
TEXT_TOKENS = 8
AUDIO_S = 1.0
AMPLITUDE = 0.1
SAME_PROGRAM = 1e-5
"""Relative difference that is always allowed: programs of merged LoRA sum in another order."""
ROUNDING_UNITS = 32
"""Relative difference that is allowed, in units of rounding of the written dtype."""


class Difference(NamedTuple):
    """How far the outputs of two models differ."""

    relative: float
    """The largest root mean square of the difference, over that of the expected output."""
    limit: float
    nonfinite: tuple[str, ...]
    """Outputs with values that are not finite, in either model."""

    @property
    def is_small(self) -> bool:
        """True if both models compute the same."""
        return not self.nonfinite and self.relative <= self.limit

    def summary(self) -> str:
        """One line for a report."""
        if self.nonfinite:
            return f"not finite: {', '.join(self.nonfinite)}"
        return f"finite outputs, relative difference {self.relative:.1e} (limit {self.limit:.1e})"


def compare(expected: Outputs, found: Outputs, rounded_to: str | None) -> Difference:
    """Compares two models. `rounded_to` is the dtype that weights were rounded to, or None."""
    wrong = [n for n, x in (*expected.items(), *found.items()) if not np.isfinite(x).all()]
    relative = 0.0
    for name, value in expected.items():
        scale = max(_rms(value), float(np.finfo(np.float32).tiny))
        relative = max(relative, _rms(found[name] - value) / scale)
    unit = 0.0 if rounded_to is None else float(jnp.finfo(rounded_to).eps) / 2
    return Difference(
        relative, max(SAME_PROGRAM, ROUNDING_UNITS * unit), tuple(dict.fromkeys(wrong))
    )


def probe_speech(graphdef: Any, variables: Variables, config: SalmConfig | DuplexConfig) -> Outputs:
    """Frames and logits of a SALM for noise followed by text.

    Of a duplex model: frames and the logits of both heads for noise, and the codec's audio of fixed
    codes.
    """
    run = _duplex if isinstance(config, DuplexConfig) else _salm
    noise = _noise(config.perception.preprocessor.sample_rate)
    return _host(run(graphdef, _readable(graphdef, variables), noise))


def probe_ctc(graphdef: Any, variables: Variables, sampling_rate: int) -> Outputs:
    """Logits of a CTC model for noise."""
    return _host(_ctc(graphdef, variables, _noise(sampling_rate)))


def probe_llm(
    config: DecoderConfig, variables: Variables, lora: LoraConfig | None = None
) -> Outputs:
    """Logits of an LLM alone for text."""
    graphdef = split(abstract(lambda rngs: Decoder(config, rngs=rngs, lora=lora)))[0]
    return _host(_llm(graphdef, _readable(graphdef, variables)))


@partial(jax.jit, static_argnames=("graphdef",))
def _salm(
    graphdef: Any, variables: Variables, audio: Float[Array, "1 S"]
) -> dict[str, Float[Array, "..."]]:
    network: Salm = merge(graphdef, variables)
    frames = _frames(network, audio)
    text = network.llm.embed(_token_ids(TEXT_TOKENS, network.llm.config.vocab_size))
    embeds = jnp.concatenate([frames, text.astype(network.dtype)], axis=1)
    return {"frames": frames, "logits": network.llm.logits(hidden_states(network, embeds))}


@partial(jax.jit, static_argnames=("graphdef",))
def _duplex(
    graphdef: Any, variables: Variables, audio: Float[Array, "1 S"]
) -> dict[str, Float[Array, "..."]]:
    network: Duplex = merge(graphdef, variables)
    codebooks = network.config.codebooks
    frames = _frames(network, audio)
    count = frames.shape[1]
    codes = _token_ids(count * codebooks.count, codebooks.size).reshape(1, count, codebooks.count)
    text = _token_ids(count, network.llm.config.vocab_size)
    channels = Channels(
        user=frames,
        text=text,
        codes=codes,
        text_targets=text,
        code_targets=codes,
        is_scored=jnp.ones(text.shape, bool),
        frames=jnp.array([count]),
    )
    hidden = hidden_states(network, network.embed(channels))
    audio_hidden = network.audio_hidden(hidden, codes, DuplexModes(), None)
    return {
        "frames": frames,
        "text_logits": network.llm.logits(hidden),
        "audio_logits": network.audio_logits(audio_hidden),
        "audio": network.codec.decode(codes, jnp.array([count])).audio,
    }


@partial(jax.jit, static_argnames=("graphdef",))
def _ctc(
    graphdef: Any, variables: Variables, audio: Float[Array, "1 S"]
) -> dict[str, Float[Array, "..."]]:
    network: CtcNetwork = merge(graphdef, variables)
    output = network(audio, jnp.array([audio.shape[1]]), dtype=jnp.dtype(network.ctc.compute_dtype))
    return {"logits": network.logits(output.frames)}


@partial(jax.jit, static_argnames=("graphdef",))
def _llm(graphdef: Any, variables: Variables) -> dict[str, Float[Array, "..."]]:
    decoder: Decoder = merge(graphdef, variables)
    ids = _token_ids(TEXT_TOKENS, decoder.config.vocab_size)
    hidden = decoder(
        decoder.embed(ids).astype(jnp.float32),
        positions=jnp.arange(TEXT_TOKENS)[None],
        segments=jnp.ones(ids.shape, jnp.int32),
        attention_mask=jnp.ones(ids.shape, bool),
    )
    return {"logits": decoder.logits(hidden)}


def _readable(graphdef: Any, variables: Variables) -> Variables:
    """The variables as inference programs read them."""
    return cast(Variables, LayerViews("").whole(graphdef, on_default_device(dict(variables))))


def _frames(network: Salm | Duplex, audio: Float[Array, "1 S"]) -> Float[Array, "1 T D"]:
    lengths = jnp.array([audio.shape[1]])
    modes = PerceptionModes()
    return network.perception(audio, lengths, modes=modes, dtype=network.dtype).frames


def _noise(sampling_rate: int) -> Float[np.ndarray, "1 S"]:
    samples = int(AUDIO_S * sampling_rate)
    noise = np.random.default_rng(0).normal(scale=AMPLITUDE, size=(1, samples))
    return noise.astype(np.float32)


def _token_ids(count: int, vocab_size: int) -> Int[Array, "1 T"]:
    """Ids that are spread over the vocabulary."""
    return jnp.arange(count, dtype=jnp.int32)[None] * 7919 % vocab_size


def _host(outputs: Mapping[str, jax.Array]) -> Outputs:
    return {name: np.asarray(value, np.float32) for name, value in outputs.items()}


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
