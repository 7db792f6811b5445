"""`Perceiving`: the perception module of a model with an LLM, for whole clips and for streams."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.inference import stages
from speechlm2_jax.inference.perception_stream import PerceptionStream
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.perception.perception import PerceptionModes


class Perceiving(ABC):
    """A base of the models with an LLM: all that runs their perception module."""

    _blueprint: Any
    _graphdef: Any

    @property
    @abstractmethod
    def nemo_exact(self) -> bool:
        """Whether results that depend on NeMo's own padding are reproduced."""

    @abstractmethod
    def is_trained(self, prefix: str) -> bool:
        """Whether training changes any parameter below a path."""

    @abstractmethod
    def _inference_variables(self) -> Variables:
        """`variables` as inference programs read them."""

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the input audio in Hz."""
        return self._blueprint.network.perception.preprocessor.sample_rate

    @property
    def token_equivalent_duration(self) -> float:
        """Seconds of audio per frame of the LLM."""
        return self._blueprint.network.perception.token_equivalent_duration

    @property
    def frame_count(self) -> Callable[[int], int]:
        """Number of samples of a clip -> number of its frames in the LLM."""
        return self._blueprint.network.perception.frame_count

    def perception(
        self, input_signal: ArrayLike, input_signal_length: ArrayLike
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes audio [B, S] with lengths [B] in samples into (frames [B, T, D], lengths [B])."""
        return stages.perceive(
            self._graphdef,
            self._inference_variables(),
            jnp.asarray(input_signal, jnp.float32),
            jnp.asarray(input_signal_length, jnp.int32),
        )

    def perception_stream(
        self,
        batch: int = 1,
        *,
        frames: int | None = None,
        context: tuple[int, int] | None = None,
        longest: int | None = None,
    ) -> PerceptionStream:
        """Starts `batch` audio streams that are encoded in chunks of `frames` frames.

        The default is the shortest chunk that the encoder's look-ahead allows. `context` is the
        encoder's (left, right) attention context, by default the first of its `att_context_size`.
        `longest` bounds an unlimited left context, in encoder frames. Raises ValueError, naming the
        setting, for a perception module that needs whole clips.
        """
        return PerceptionStream.of_model(
            self._blueprint.network.perception,
            self._inference_variables(),
            batch,
            self._blueprint.network.compute_dtype,
            frames=frames,
            context=context,
            longest=longest,
        )

    def _perception_modes(self) -> PerceptionModes:
        """The modes of a training step."""
        return PerceptionModes(
            encoder=self.is_trained("perception.encoder."),
            adapter=True,
            spec_augment=True,
            nemo_exact=self.nemo_exact,
        )
