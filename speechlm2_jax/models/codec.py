"""AudioCodec, the user-facing class of NeMo's AudioCodecModel."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.codec.codec import Audio, Codec, Codes
from speechlm2_jax.codec.resampling import resample, resampled_length
from speechlm2_jax.codec.streaming import DecoderStream
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.codec import codec_table
from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.inference import stages
from speechlm2_jax.inference.padding import round_up
from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.module import VariableInfo, Variables, abstract, describe, merge, split
from speechlm2_jax.pretrained.codec_config import codec_config
from speechlm2_jax.pretrained.registry import find_nemo

FRAME_UNIT = 8
"""Unit of rounding for numbers of frames, so that few programs are compiled."""


class AudioCodec:
    """Encodes waveforms to codes and decodes them. `cfg` is NeMo's codec config as a plain dict.

    Weights are random until loaded; `from_pretrained` does both. Raises SettingsError for a bad
    or unsupported key.
    """

    def __init__(self, cfg: Mapping[str, object], *, seed: int = 0):
        self.config = codec_config(cfg)
        self._seed = seed
        module = abstract(self._make)
        self._graphdef: Any = split(module)[0]
        self.infos: dict[str, VariableInfo] = describe(module)
        self._variables: Variables | None = None
        self._folded: tuple[Any, Variables] | None = None

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "AudioCodec":
        """Loads a `.nemo` file, or the one of a hub repository.

        Raises SettingsError if there is none, and for a model of another class; ConversionError for
        weights that do not fit.
        """
        archive = read_nemo(find_nemo(cls, path, key="pretrained_audio_codec"))
        model = cls(archive.config)
        model.variables = mapping.load(archive.weights, codec_table(model.config), model.infos)
        return model

    @property
    def variables(self) -> Variables:
        """Weights and buffers by path; randomly initialized at the first access."""
        if self._variables is None:
            self._variables = draw(lambda: split(self._make(nnx.Rngs(self._seed)))[1])
        return self._variables

    @variables.setter
    def variables(self, values: Variables) -> None:
        """Replaces the weights and buffers: every path of the network."""
        self._variables, self._folded = values, None

    @property
    def device(self) -> jax.Device:
        """The device that the model runs on, the first of several. Inputs may be on any."""
        return stages.device_of(self._variables)

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.config.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Samples per frame of codes."""
        return self.config.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks K: codes per frame."""
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Number of codes of each codebook."""
        return self.config.codebook_size

    def encode(
        self,
        audio: ArrayLike,
        lengths: ArrayLike,
        sample_rate: int | None = None,
        *,
        nemo_exact: bool = False,
    ) -> Codes:
        """Encodes audio [B, S] of `lengths` [B] samples: codes [B, T, K] and their lengths.

        `sample_rate` is that of the audio, if it is not the codec's. With `nemo_exact` padding has
        the effect that it has in NeMo (docs/parity.md). Raises ValueError if audio and lengths do
        not fit.
        """
        audio, lengths = np.asarray(audio, np.float32), np.asarray(lengths, np.int32)
        _check(audio, lengths, 2)
        rate = sample_rate or self.sample_rate
        longest = resampled_length(int(lengths.max(initial=0)), rate, self.sample_rate)
        frames = self.config.frame_count(longest)
        size = round_up(frames, FRAME_UNIT) * self.samples_per_frame
        audio = _fitted(audio, -(-size * rate // self.sample_rate))
        graphdef, variables = self._compute()
        options = {"from_hz": rate, "size": size, "nemo_exact": nemo_exact}
        codes, counts = _encode(graphdef, variables, audio, lengths, **options)
        return Codes(codes[:, :frames], counts)

    def decode(self, codes: ArrayLike, lengths: ArrayLike, *, nemo_exact: bool = False) -> Audio:
        """Decodes codes [B, T, K]: samples [B, T * samples_per_frame] and their lengths.

        Raises ValueError if codes and lengths do not fit.
        """
        codes, lengths = np.asarray(codes, np.int32), np.asarray(lengths, np.int32)
        _check(codes, lengths, 3)
        frames = codes.shape[1]
        graphdef, variables = self._compute()
        audio, counts = _decode(
            graphdef,
            variables,
            _fitted(codes, round_up(frames, FRAME_UNIT)),
            lengths,
            np.int32(frames),
            nemo_exact=nemo_exact,
        )
        return Audio(audio[:, : frames * self.samples_per_frame], counts)

    def new_stream(self, batch: int = 1) -> DecoderStream:
        """Makes the state of `batch` streams to decode.

        Raises ValueError for a codec whose decoder looks ahead.
        """
        return merge(self._graphdef, self.variables).new_stream(batch)

    def decode_step(
        self, stream: DecoderStream, codes: ArrayLike
    ) -> tuple[Float[Array, "B S"], DecoderStream]:
        """Decodes the next frames [B, T, K] of each stream; the old state is donated."""
        graphdef, variables = self._compute()
        return _decode_step(graphdef, variables, stream, jnp.asarray(codes, jnp.int32))

    def _make(self, rngs: nnx.Rngs) -> Codec:
        return Codec(self.config, rngs=rngs)

    def _compute(self) -> tuple[nnx.GraphDef[Codec], Variables]:
        """(graphdef, variables) with weight norm folded into the kernels, cached."""
        if self._folded is None:
            graphdef = split(abstract(lambda rngs: _folded(self._make(rngs))))[0]
            self._folded = graphdef, _fold(self._graphdef, self.variables)
        return self._folded


@partial(jax.jit, static_argnames=("graphdef",))
def _fold(graphdef: nnx.GraphDef[Codec], variables: Variables) -> Variables:
    return split(_folded(merge(graphdef, variables)))[1]


@partial(jax.jit, static_argnames=("graphdef", "from_hz", "size", "nemo_exact"))
def _encode(
    graphdef: nnx.GraphDef[Codec],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    *,
    from_hz: int,
    size: int,
    nemo_exact: bool,
) -> Codes:
    codec: Codec = merge(graphdef, variables)
    if from_hz != codec.sample_rate:
        if not nemo_exact:
            is_real = jnp.arange(audio.shape[1])[None] < lengths[:, None]
            audio = jnp.where(is_real, audio, 0.0)
        audio = resample(audio, from_hz, codec.sample_rate)[:, :size]
        lengths = resampled_length(lengths, from_hz, codec.sample_rate)
        audio = jnp.where(jnp.arange(audio.shape[1])[None] < lengths[:, None], audio, 0.0)
    return codec.encode(audio, lengths, nemo_exact=nemo_exact)


@partial(jax.jit, static_argnames=("graphdef", "nemo_exact"))
def _decode(
    graphdef: nnx.GraphDef[Codec],
    variables: Variables,
    codes: Int[Array, "B T K"],
    lengths: Int[Array, " B"],
    extent: Int[Array, ""],
    *,
    nemo_exact: bool,
) -> Audio:
    codec: Codec = merge(graphdef, variables)
    return codec.decode(codes, lengths, nemo_exact=nemo_exact, extent=extent)


@partial(jax.jit, static_argnames=("graphdef",), donate_argnames=("stream",))
def _decode_step(
    graphdef: nnx.GraphDef[Codec],
    variables: Variables,
    stream: DecoderStream,
    codes: Int[Array, "B T K"],
) -> tuple[Float[Array, "B S"], DecoderStream]:
    codec: Codec = merge(graphdef, variables)
    return codec.decode_step(stream, codes)


def _folded(codec: Codec) -> Codec:
    codec.fold()
    return codec


def _fitted(batch: np.ndarray, size: int) -> np.ndarray:
    """Truncates the second axis, or pads it with zeros."""
    batch = batch[:, :size]
    widths = [(0, 0), (0, size - batch.shape[1])] + [(0, 0)] * (batch.ndim - 2)
    return np.pad(batch, widths)


def _check(batch: np.ndarray, lengths: np.ndarray, rank: int) -> None:
    if batch.ndim != rank or lengths.shape != batch.shape[:1]:
        raise ValueError(
            f"expected a batch of rank {rank} and one length per element, got {batch.shape} and "
            f"{lengths.shape}"
        )
    if lengths.size and not 0 <= lengths.min() <= lengths.max() <= batch.shape[1]:
        raise ValueError(f"lengths {lengths.tolist()} must lie within 0 and {batch.shape[1]}")
