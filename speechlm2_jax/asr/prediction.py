"""Prediction network of a transducer (Graves 2012): an LSTM over the labels so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.layers.linear import Embedding
from speechlm2_jax.layers.lstm import Lstm, LstmState

_INITIAL_VALUES = "initialises training; the archive has the trained values"
_TRAINING = "only read in training"


@dataclass(frozen=True, kw_only=True)
class PrednetConfig:
    """NeMo's `decoder.prednet` block."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        "forget_gate_bias": _INITIAL_VALUES,
        "t_max": _INITIAL_VALUES,
        "weights_init_scale": _INITIAL_VALUES,
        "hidden_hidden_bias_scale": _INITIAL_VALUES,
        "dropout": _TRAINING,
    }
    REFUSED: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "rnn_hidden_size": ("only LSTMs of width pred_hidden are supported; set it to -1", -1),
    }

    pred_hidden: int
    pred_rnn_layers: int


@dataclass(frozen=True, kw_only=True)
class PredictionConfig:
    """NeMo's `decoder` block of a transducer."""

    TARGETS: ClassVar[tuple[str, ...]] = ("RNNTDecoder",)
    IGNORED: ClassVar[Mapping[str, str]] = {"random_state_sampling": _TRAINING}
    REFUSED: ClassVar[Mapping[str, str]] = {
        "normalization_mode": "LSTMs with normalisation are not supported; set it to null",
    }

    prednet: PrednetConfig
    vocab_size: int
    """Pieces of the tokenizer, without the blank."""
    blank_as_pad: bool = True

    def __post_init__(self) -> None:
        if not self.blank_as_pad:
            raise ValueError("blank_as_pad=false is not supported; use a model with true")


class PredictionNetwork(nnx.Module):
    """Embedding and LSTM over labels. Label `vocab_size` is the blank; its embedding is zero."""

    def __init__(self, config: PredictionConfig, *, rngs: nnx.Rngs):
        self.blank = config.vocab_size
        width = config.prednet.pred_hidden
        self.embedding = Embedding(config.vocab_size + 1, width, rngs=rngs)
        self.lstm = Lstm(width, config.prednet.pred_rnn_layers, rngs=rngs)

    def initial_state(self, batch: int) -> LstmState:
        """Makes the initial state; the first input is the blank."""
        return self.lstm.initial_state(batch)

    def step(
        self, labels: Int[Array, " B"], state: LstmState
    ) -> tuple[Float[Array, "B D"], LstmState]:
        """Advances by one label per sequence."""
        return self.lstm.step(self._embed(labels), state)

    def __call__(self, labels: Int[Array, "B U"]) -> tuple[Float[Array, "B U1 D"], LstmState]:
        """Runs whole sequences after a leading blank: U + 1 outputs, and the last state."""
        starts = jnp.full((labels.shape[0], 1), self.blank, labels.dtype)
        embedded = self._embed(jnp.concatenate([starts, labels], axis=1))
        return self.lstm(embedded, self.initial_state(labels.shape[0]))

    def _embed(self, labels: Int[Array, "*B"]) -> Float[Array, "*B D"]:
        return jnp.where((labels == self.blank)[..., None], 0.0, self.embedding(labels))
