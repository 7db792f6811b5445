"""A neural audio codec: waveforms [B, S] <-> codes [B, T, K]. Computes what NeMo's codec computes.

The result of a sequence depends on its own samples alone. They are zero-padded to whole frames, and
the padding of convolutions (reflection, for instance) acts at the sequence's own end. With
`nemo_exact` the batch is treated as in NeMo: padding acts at the end of the longest sequence only,
shorter ones see zeros there, and samples between a sequence's length and the end of its last frame
are used as they are.
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
    """Frames before quantization, and their real lengths; zeros beyond."""

    frames: Float[Array, "B T D"]
    lengths: Int[Array, " B"]


class Codes(NamedTuple):
    """Codes of each frame, and the real lengths in frames; zeros beyond."""

    codes: Int[Array, "B T K"]
    lengths: Int[Array, " B"]


class Audio(NamedTuple):
    """Samples within [-1, 1], and their real lengths; zeros beyond."""

    audio: Float[Array, "B S"]
    lengths: Int[Array, " B"]


class Codec(nnx.Module):
    """Encoder, quantizer and decoder. Computes in fp32 whatever the dtype of the variables."""

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
        """Samples per frame of codes."""
        return self.config.samples_per_frame

    @property
    def num_codebooks(self) -> int:
        """Codes per frame, K."""
        return self.config.num_codebooks

    @property
    def codebook_size(self) -> int:
        """Number of codes of each codebook."""
        return self.config.codebook_size

    @property
    def frame_rate_hz(self) -> float:
        """Frames per second."""
        return self.config.frame_rate_hz

    def frame_count(self, samples: int) -> int:
        """Counts the frames of `samples` samples, in plain integers."""
        return self.config.frame_count(samples)

    def embed(
        self,
        audio: Float[Array, "B S"],
        lengths: Int[Array, " B"],
        *,
        nemo_exact: bool = False,
        extent: Int[Array, "*rows"] | None = None,
    ) -> CodecFrames:
        """Encodes sequences of `lengths` samples into frames; length 0 gives 0 frames.

        With `nemo_exact`, `extent` is the longest sequence of NeMo's batch in samples (one number
        or one per sequence); samples from there on are zeroed. None: the longest sequence here,
        rounded up to whole frames.
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
        """Encodes sequences of `lengths` samples into codes; arguments as in `embed`."""
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
        """Decodes sequences of `lengths` frames. Codes of codebook_size or more wrap around.

        With `nemo_exact`, `extent` is the longest sequence of NeMo's batch in frames; None: T.
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
        """Makes the state of `batch` new streams. Raises ValueError if it is not causal."""
        return streaming.start(self.decoder, batch)

    def decode_step(
        self, stream: streaming.DecoderStream, codes: Int[Array, "B T K"]
    ) -> tuple[Float[Array, "B S"], streaming.DecoderStream]:
        """Decodes the next T frames of each stream into T * samples_per_frame samples."""
        return streaming.advance(self.decoder, stream, self.quantizer.dequantize(codes))

    def fold(self) -> None:
        """Replaces every weight norm by its kernel, so that no program computes it again.

        This drops gains and directions, so fold a copy (`merge` makes one).
        """
        for _, module in list(nnx.iter_modules(self)):
            if isinstance(module, CodecConvolution):
                module.fold()


def _round_up(samples: Int[Array, "*rows"], size: int) -> Int[Array, "*rows"]:
    """Rounds up to whole frames."""
    return -(-samples // size) * size
