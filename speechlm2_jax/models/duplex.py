"""The user-facing full-duplex models: user audio in and agent audio out, frame by frame."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from speechlm2_jax import sharding
from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.batches import (
    DuplexBatch,
    DuplexExample,
    DuplexShape,
    HostBatch,
    StepLosses,
    assemble_duplex_batch,
)
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.generation.duplex import DuplexSamplingConfig
from speechlm2_jax.generation.sampling import SamplingConfig
from speechlm2_jax.inference import stages
from speechlm2_jax.inference.batching import check_batch, pad_lengths, pad_to_static_shape
from speechlm2_jax.inference.duplex_programs import decode_codes, run_offline, silent_codes
from speechlm2_jax.inference.padding import SAMPLE_UNIT, round_up
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.models.asr import ASRModel
from speechlm2_jax.models.duplex_sessions import ModelWithSessions
from speechlm2_jax.networks import duplex as duplex_network
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex import Duplex, DuplexModes
from speechlm2_jax.networks.flops import duplex_flops
from speechlm2_jax.pretrained import duplex
from speechlm2_jax.pretrained.duplex import DuplexBlueprint
from speechlm2_jax.pretrained.duplex_config import DuplexModelConfig, DuplexSpeechDecoderModelConfig
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding

FRAME_UNIT = 32
"""Unit of rounding for numbers of frames."""


class Targets(NamedTuple):
    """Targets of the agent: frame t is predicted after the user's frame t."""

    text: Int32[Array | np.ndarray, "B T"]
    codes: Int32[Array | np.ndarray, "B T K"]
    frames: Int32[Array | np.ndarray, " B"]
    """Frames of each conversation without padding."""


class DuplexS2SModel(ModelWithSessions):
    """Reads 80 ms of user audio per frame and predicts a text token and K audio codes of the agent.

    `cfg` is NeMo's `model:` block as a plain dict. Weights come from `pretrained_llm`,
    `pretrained_asr` and `pretrained_audio_codec`; `pretrained_weights: false` starts all but the
    codec at random. Raises SettingsError, before anything is compiled, for a bad key, a missing
    file, a tokenizer without bos or eos, or frame rates that do not fit.
    """

    ALWAYS_FROZEN = (r"^audio_codec\..+$",)
    CONFIG: ClassVar[type[DuplexModelConfig]] = DuplexModelConfig
    _blueprint: DuplexBlueprint

    @classmethod
    def read_blueprint(cls, cfg: Mapping[str, object], near: tuple[Path, ...]) -> DuplexBlueprint:
        """Reads configs and tokenizer, no weights."""
        return duplex.read_blueprint(cls.CONFIG, cfg, near)

    # NeMo's attributes ----------------------------------------------------------------------

    @property
    def target_sampling_rate(self) -> int:
        """Sampling rate of the agent's audio in Hz."""
        return self._blueprint.network.codec.sample_rate

    @property
    def speech_vocab_size(self) -> int:
        """Number of codes of each codebook, control codes included."""
        return self._blueprint.network.codebooks.vocab_size

    @property
    def speech_bos_id(self) -> int:
        """The code that starts an utterance."""
        return self._blueprint.network.codebooks.bos

    @property
    def speech_eos_id(self) -> int:
        """The code that ends an utterance."""
        return self._blueprint.network.codebooks.eos

    @property
    def speech_delay_id(self) -> int:
        """The code before the first frame."""
        return self._blueprint.network.codebooks.delay

    @property
    def turn_ids(self) -> TextIds:
        """Token ids that start, end and fill the text channels."""
        return self._blueprint.network.text

    @property
    def max_frames(self) -> int | None:
        """Frame limit of a conversation: learnt positions of a speech decoder; None: no limit."""
        return self._blueprint.network.max_frames

    def __call__(
        self, input_embeds: ArrayLike, input_audio_tokens: ArrayLike | None = None
    ) -> dict[str, jax.Array]:
        """Runs whole conversations of embeddings [B, T, D].

        Returns `text_logits` [B, T, V] and `audio_logits` [B, T, K, W]. `input_audio_tokens`
        [B, T, K] are the codes delayed by one frame, the input of a speech decoder.
        """
        text, audio = _logits(
            self._graphdef,
            self._inference_variables(),
            jnp.asarray(input_embeds),
            None if input_audio_tokens is None else jnp.asarray(input_audio_tokens, jnp.int32),
        )
        return {"text_logits": text, "audio_logits": audio}

    def offline_inference(
        self,
        input_signal: ArrayLike,
        input_signal_lens: ArrayLike | None,
        decode_audio: bool = True,
        *,
        text_sampling: SamplingConfig | None = None,
        audio_sampling: SamplingConfig | None = None,
        seed: int = 0,
    ) -> dict[str, Any]:
        """Generates the agent's side for user audio [B, S] at `sampling_rate`; greedy by default.

        `input_signal_lens` [B] are in samples. The result has NeMo's keys:
        - `text`: a string per conversation; `tokens_text` int32 [B, T]
        - `tokens_audio` int32 [B, T, K]; `tokens_len` [B], frames
        - with `decode_audio`: `audio` [B, A] at `target_sampling_rate`; `audio_len` [B], samples

        After a conversation's end text tokens are pad and audio codes 0. Conversations of a batch
        do not influence each other; a mesh shards them over its devices. Raises ValueError for an
        invalid batch, and for a conversation of more than `max_frames`.
        """
        config = DuplexSamplingConfig.of(text_sampling, audio_sampling)
        audio, lengths = check_batch(input_signal, input_signal_lens)
        self._check_frames(lengths)
        placement = self._placement()
        batch = len(audio)
        groups = 1 if placement is None else placement.data_parallel_size
        audio, lengths = pad_to_static_shape(audio, lengths, groups)
        output, frames = run_offline(
            self._graphdef,
            self._decoding_variables(),
            audio,
            lengths,
            config,
            jax.random.key(seed) if config.is_random else None,
            placement=placement,
        )
        frames = np.asarray(frames)[:batch]
        longest = int(frames.max(initial=0))
        text, codes = (np.asarray(x)[:batch, :longest] for x in output)
        result: dict[str, Any] = {
            "text": [self._text(ids[:n]) for ids, n in zip(text, frames.tolist(), strict=True)],
            "tokens_text": text,
            "tokens_audio": codes,
            "tokens_len": frames,
        }
        if decode_audio:
            result["audio"], result["audio_len"] = self._audio(output.codes, frames, placement)
        return result

    def _audio(
        self, codes: jax.Array, frames: np.ndarray, placement: Sharding | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The agent's audio and its lengths in samples, without the padding of the batch."""
        batch, longest = len(frames), int(frames.max(initial=0))
        wave, samples = decode_codes(
            self._graphdef,
            self._inference_variables(),
            codes,
            pad_lengths(frames, len(codes)),
            self._silence(np.asarray(codes)[:batch], placement),
            longest,
            placement=placement,
        )
        samples = np.asarray(samples)[:batch]
        return np.asarray(wave)[:batch, : int(samples.max(initial=0))], samples

    def _check_frames(self, lengths: np.ndarray) -> None:
        most = self.max_frames
        for i, samples in enumerate(lengths.tolist()):
            frames = self.frame_count(samples)
            if most is not None and frames > most:
                raise ValueError(
                    f"recording {i} has {frames} frames ({samples / self.sampling_rate:.2f} s), "
                    f"but the speech decoder has {most} learnt positions "
                    "(model.speech_decoder.max_length_causal_mask); cut the recording"
                )

    def targets(self, examples: Sequence[DuplexExample]) -> Targets:
        """The targets of each frame, as in training, to compare `offline_inference` with."""
        shape = DuplexShape(
            sequences=round_up(len(examples), 1),
            tokens=round_up(max(len(e.target_tokens) for e in examples), FRAME_UNIT),
            source_samples=round_up(max(len(e.source_audio) for e in examples), SAMPLE_UNIT),
            target_samples=round_up(max(len(e.target_audio) for e in examples), SAMPLE_UNIT),
        )
        batch = assemble_duplex_batch([examples], shape, pad_id=self.text_pad_id)
        variables = self._inference_variables()
        found = _targets(self._graphdef, variables, batch, placement=self._placement())
        return Targets(*(np.asarray(x)[: len(examples)] for x in found))

    def _placement(self) -> Sharding | None:
        """The devices of the weights, if there are several."""
        mesh = sharding.mesh_of(self.variables)
        return None if mesh is None else sharding.for_inference(mesh)

    def _silence(self, codes: np.ndarray, placement: Sharding | None) -> np.ndarray:
        """The codec's codes [K] of silence; zeros if the first frames have no control codes."""
        codebooks = self._blueprint.network.codebooks
        if not (codes[:, :1] >= codebooks.size).any():
            return np.zeros(codebooks.count, np.int32)
        variables = self._inference_variables()
        return np.asarray(silent_codes(self._graphdef, variables, placement=placement))

    def _text(self, ids: np.ndarray) -> str:
        """The text of a text channel without pad, bos and eos."""
        text = self.turn_ids
        return self.tokenizer.ids_to_text(ids[~np.isin(ids, (text.pad, text.bos, text.eos))])

    # Interface of the trainer ---------------------------------------------------------------

    @property
    def target_frame_samples(self) -> int:
        """Samples of the agent's audio in one frame."""
        return self._blueprint.network.codec.samples_per_frame

    def find_scoring_asr(self) -> Path | None:
        """The ASR model file that scores the agent's speech in validation; None without one."""
        return self._blueprint.find_scoring_asr()

    def check_weights(self) -> None:
        """Also checks the ASR model that scores validation."""
        super().check_weights()
        path = self.find_scoring_asr()
        if path is None:
            return
        try:
            ASRModel.check(path)
        except (SettingsError, ConversionError) as error:
            raise SettingsError(
                f"model.scoring_asr: {error}; name another ASR model, or null to leave out the "
                "scores of the agent's speech"
            ) from error

    @property
    def frame_count(self) -> Callable[[int], int]:
        """Number of samples of the user's audio -> number of frames."""
        return self._blueprint.network.perception.frame_count

    def losses(
        self,
        variables: Variables,
        batch: DuplexBatch[jax.Array],
        *,
        key: jax.Array | None,
        train: bool,
    ) -> StepLosses:
        """Computes weighted cross-entropies and accuracies of both channels; pure and traceable."""
        network: Duplex = merge(self._graphdef, variables)
        modes = self._training_modes() if train else DuplexModes()
        return duplex_network.losses(network, batch, modes, key if train else None)

    def flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one training step on `batch`; the codec's are not counted."""
        arrays: DuplexBatch[np.ndarray] = batch.arrays
        network = self._blueprint.network
        count = np.vectorize(lambda n: self.frame_count(int(n)), otypes=[np.int64])
        return duplex_flops(
            self.infos,
            self.trainable,
            count(arrays.source_lengths),
            subsampling_factor=network.perception.encoder.subsampling_factor,
        )

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts a batch's (frames without padding, frames with padding)."""
        arrays: DuplexBatch[np.ndarray] = batch.arrays
        return int(arrays.token_lengths.sum()), int(arrays.target_tokens.size)

    def _training_modes(self) -> DuplexModes:
        return DuplexModes(
            perception=self._perception_modes(),
            llm=self.is_trained("llm."),
            speech_decoder=True,
        )


class DuplexS2SSpeechDecoderModel(DuplexS2SModel):
    """DuplexS2SModel whose audio codes come from an autoregressive decoder on LLM hidden states.

    `cfg` also has a `speech_decoder` block.
    """

    ALWAYS_FROZEN = (r"^audio_codec\..+$", r"^(embed_audio_tokens|audio_head)\..+$")
    CONFIG = DuplexSpeechDecoderModelConfig


@partial(jax.jit, static_argnames=("graphdef", "placement"))
def _targets(
    graphdef: nnx.GraphDef[Duplex],
    variables: Variables,
    batch: DuplexBatch[jax.Array],
    *,
    placement: Sharding | None = None,
) -> Targets:
    channels = duplex_network.prepare(merge(graphdef, variables), batch, DuplexModes()).channels
    found = Targets(channels.text_targets, channels.code_targets, channels.frames)
    with sharding.use(placement):
        return sharding.on_every_device(found)


@partial(jax.jit, static_argnames=("graphdef",))
def _logits(
    graphdef: nnx.GraphDef[Duplex],
    variables: Variables,
    embeds: Float[Array, "B T D"],
    codes: Int[Array, "B T K"] | None,
) -> tuple[Float[Array, "B T V"], Float[Array, "B T K W"]]:
    network: Duplex = merge(graphdef, variables)
    hidden = stages.hidden_states(network, embeds)
    audio = network.audio_hidden(hidden, codes, DuplexModes(), None)
    return network.llm.logits(hidden), network.audio_logits(audio)
