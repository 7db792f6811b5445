"""A neural audio codec: waveforms [B, S] <-> codes [B, T, K]. The definition is NeMo's.

A row's result depends on its own samples alone: they are padded with zeros to whole frames, and
beyond their ends the row is continued as if it were alone. With `nemo_exact` the rows are treated
as one batch of NeMo: it is continued beyond its longest row only, shorter rows see zeros there,
and the samples between a row's length and the end of its last frame count as they are.
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.codec import streaming
from speechlm2_jax.codec.boundary import SequenceBoundary
from speechlm2_jax.codec.config import CodecConfig
from speechlm2_jax.codec.convolutions import CodecConvolution
from speechlm2_jax.codec.decoder import HiFiGANDecoder
from speechlm2_jax.codec.encoder import HiFiGANEncoder
from speechlm2_jax.codec.finite_scalar_quantizer import FiniteScalarQuantizer
from speechlm2_jax.sharding import constrain


class CodecFrames(NamedTuple):
    """Frames before quantization, and how many of each row are real; zeros beyond."""

    frames: Float[Array, "B T D"]
    lengths: Int[Array, " B"]


class Codes(NamedTuple):
    """Codes of each frame, and how many frames of each row are real; zeros beyond."""

    codes: Int[Array, "B T K"]
    lengths: Int[Array, " B"]


class Audio(NamedTuple):
    """Samples within [-1, 1], and how many of each row are real; zeros beyond."""

    audio: Float[Array, "B S"]
    lengths: Int[Array, " B"]


class Codec(nnx.Module):
    """Encoder, quantizer and decoder, in fp32 whatever the dtype of their variables."""

    def __init__(self, config: CodecConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = HiFiGANEncoder(config.audio_encoder, rngs=rngs)
        self.quantizer = FiniteScalarQuantizer(config.vector_quantizer)
        self.decoder = HiFiGANDecoder(config.audio_decoder, rngs=rngs)

    @property
    def sample_rate(self) -> int:
        """Samples per second."""
        return self.config.sample_rate

    @property
    def samples_per_frame(self) -> int:
        """Samples behind one frame of codes."""
        return self.config.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """Codes per frame, K."""
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Different codes of each codebook."""
        return self.config.codebook_size

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second."""
        return self.config.frame_rate_hz

    def frame_count(self, samples: int) -> int:
        """Counts the frames that `samples` samples make, in plain integers."""
        return self.config.frame_count(samples)

    def embed(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        nemo_exact: bool = False,
        extent: Int[Array, "*rows"] | None = None,
    ) -> CodecFrames:
        """Encodes rows of `lengths` samples into frames; a row of length 0 has none.

        With `nemo_exact`, `extent` is the longest row of NeMo's batch in samples (one number, or
        one for each row); from there on all samples are taken for zeros. None: the longest here,
        and all samples count.
        """
        size = self.samples_per_frame
        lengths = jnp.clip(lengths, 0, audio.shape[1])
        padded = _round_up(lengths, size)
        ends, counted_samples = padded, lengths
        if nemo_exact:
            counted_samples = jnp.max(padded) if extent is None else extent
            counted_samples = jnp.broadcast_to(counted_samples, lengths.shape)
            ends = _round_up(counted_samples, size)
        audio = jnp.where(jnp.arange(audio.shape[1])[None] < counted_samples[:, None], audio, 0.0)
        audio = jnp.pad(audio, ((0, 0), (0, -audio.shape[1] % size)))
        audio = constrain(audio.astype(jnp.float32), "clips", None)
        boundary = SequenceBoundary(lengths=padded, ends=ends)
        frames, _ = self.encoder(audio[..., None], boundary)
        return CodecFrames(frames, padded // size)

    def encode(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        nemo_exact: bool = False,
        extent: Int[Array, "*rows"] | None = None,
    ) -> Codes:
        """Computes the codes of rows of `lengths` samples; the arguments are those of `embed`."""
        encoded = self.embed(audio, lengths, nemo_exact=nemo_exact, extent=extent)
        codes = self.quantizer.quantize(encoded.frames)
        is_real = jnp.arange(codes.shape[1])[None] < encoded.lengths[:, None]
        codes = jnp.where(is_real[..., None], codes, 0)
        return Codes(constrain(codes, "clips", None, None), encoded.lengths)

    def decode(
        self,
        codes: Int[Array, "B T K"],
        lengths: Int[Array, " B"],
        *,
        nemo_exact: bool = False,
        extent: Int[Array, "*rows"] | None = None,
    ) -> Audio:
        """Computes the samples of rows of `lengths` frames; a code beyond its codebook wraps.

        With `nemo_exact`, `extent` is the longest row of NeMo's batch in frames; None: all T.
        """
        lengths = jnp.clip(lengths, 0, codes.shape[1])
        ends = lengths
        if nemo_exact:
            ends = jnp.broadcast_to(codes.shape[1] if extent is None else extent, lengths.shape)
        boundary = SequenceBoundary(lengths=lengths, ends=ends)
        frames = boundary.mask_padding(self.quantizer.dequantize(codes))
        audio, _ = self.decoder(constrain(frames, "clips", None, None), boundary)
        return Audio(constrain(audio[..., 0], "clips", None), lengths * self.samples_per_frame)

    def new_stream(self, batch: int) -> streaming.DecoderStream:
        """Makes the state of `batch` streams to decode. Raises ValueError if not causal."""
        return streaming.start(self.decoder, batch)

    def decode_step(
        self, stream: streaming.DecoderStream, codes: Int[Array, "B T K"]
    ) -> tuple[Float[Array, "B S"], streaming.DecoderStream]:
        """Decodes the next T frames of each stream into T * samples_per_frame samples."""
        return streaming.advance(self.decoder, stream, self.quantizer.dequantize(codes))

    def fold(self) -> None:
        """Computes every kernel once for all: then it is not computed anew in each program.

        Gains and directions are gone afterwards, so fold a copy (`merge` makes one).
        """
        for _, module in list(nnx.iter_modules(self)):
            if isinstance(module, CodecConvolution):
                module.fold()


def _round_up(samples: Int[Array, "*rows"], size: int) -> Int[Array, "*rows"]:
    """Rounds up to whole frames."""
    return -(-samples // size) * size
