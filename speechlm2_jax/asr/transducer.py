"""Transducers over a FastConformer: RNN-T (Graves 2012) and TDT (Xu et al. 2023)."""

from dataclasses import dataclass

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from speechlm2_jax.asr.joint import Joint, JointConfig
from speechlm2_jax.asr.prediction import PredictionConfig, PredictionNetwork
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.perception.fastconformer_config import FastConformerConfig
from speechlm2_jax.perception.log_mel import LogMelConfig
from speechlm2_jax.perception.perception import AudioPerception, PerceptionConfig


@dataclass(frozen=True, kw_only=True)
class TransducerConfig:
    """Architecture of a transducer; `decoder` and `joint` are NeMo's blocks of these names."""

    preprocessor: LogMelConfig
    encoder: FastConformerConfig
    decoder: PredictionConfig
    joint: JointConfig
    durations: tuple[int, ...] = ()
    """Durations in frames that a TDT model predicts; () for RNN-T."""
    has_ctc_head: bool = False
    """Whether a CTC head shares the encoder (NeMo's hybrid models)."""

    def __post_init__(self) -> None:
        net = self.joint.jointnet
        for ours, theirs in (
            (("joint.num_classes", self.joint.num_classes), ("decoder.vocab_size", self.blank)),
            (
                ("joint.num_extra_outputs", self.joint.num_extra_outputs),
                ("the number of durations", len(self.durations)),
            ),
            (
                ("joint.jointnet.encoder_hidden", net.encoder_hidden),
                ("the encoder's width", self.encoder.width),
            ),
            (
                ("joint.jointnet.pred_hidden", net.pred_hidden),
                ("decoder.prednet.pred_hidden", self.decoder.prednet.pred_hidden),
            ),
        ):
            if ours[1] != theirs[1]:
                raise ValueError(f"{ours[0]}={ours[1]} must be {theirs[0]}: {theirs[1]}")
        if any(duration < 0 for duration in self.durations):
            raise ValueError(f"durations={self.durations} must not be negative")

    @property
    def blank(self) -> int:
        """Class index of the blank: the one after the tokenizer's pieces."""
        return self.decoder.vocab_size

    @property
    def perception(self) -> PerceptionConfig:
        """The front end and the encoder."""
        return PerceptionConfig.of_encoder(self.preprocessor, self.encoder)


class TransducerNetwork(AudioPerception):
    """Log-mel, encoder, prediction network and joint; for hybrid models also a CTC head.

    With `perception` it is that of a speech LLM too: the adapter reads the same encoder.
    """

    def __init__(
        self,
        config: TransducerConfig,
        *,
        rngs: nnx.Rngs,
        perception: PerceptionConfig | None = None,
    ):
        super().__init__(perception or config.perception, rngs=rngs)
        self.transducer = config
        self.prediction = PredictionNetwork(config.decoder, rngs=rngs)
        self.joint = Joint(config.joint, rngs=rngs)
        self.head = (
            Linear(config.encoder.width, config.blank + 1, axes=(None, "embed"), rngs=rngs)
            if config.has_ctc_head
            else None
        )

    def logits(self, frames: Float[Array, "B T D"]) -> Float[Array, "B T C"]:
        """Computes the logits of the CTC head. Raises ValueError for a model without one."""
        if self.head is None:
            raise ValueError("this transducer has no CTC head; use its transducer decoder")
        return self.head(frames).astype(jnp.float32)
