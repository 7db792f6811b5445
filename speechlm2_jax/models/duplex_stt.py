"""The user-facing duplex speech-to-text model: user audio in and the agent's text out."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from speechlm2_jax import sharding
from speechlm2_jax.arrays import ArrayLike
from speechlm2_jax.batches import DuplexSttBatch, HostBatch, StepLosses
from speechlm2_jax.data.duplex.text_channel import channel_texts, timed_texts
from speechlm2_jax.inference.batching import check_batch, pad_lengths, pad_to_static_shape
from speechlm2_jax.inference.duplex_stt_programs import logits, run_offline
from speechlm2_jax.inference.sessions.opening import SESSION_WINDOW_S
from speechlm2_jax.inference.sessions.stt_session import SttSession, SttSessionOptions
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.models.base import SpeechModel
from speechlm2_jax.networks import duplex_stt as network_stages
from speechlm2_jax.networks.channels import TextIds
from speechlm2_jax.networks.duplex import DuplexModes
from speechlm2_jax.networks.duplex_stt import DuplexStt
from speechlm2_jax.networks.flops import duplex_stt_flops
from speechlm2_jax.pretrained import duplex_stt
from speechlm2_jax.pretrained.duplex_stt import DuplexSttBlueprint
from speechlm2_jax.pretrained.duplex_stt_config import DuplexSttModelConfig

PROMPT_UNIT = 8
"""Unit of rounding for tokens of system prompts."""


class DuplexSTTModel(SpeechModel):
    """Reads 80 ms of user audio per frame and predicts a text token of the agent.

    With `predict_user_text` a second head transcribes the speech. `cfg` is NeMo's `model:`
    block as a plain dict. Weights come from `pretrained_llm` and `pretrained_asr`;
    `pretrained_weights: false` starts at random. Raises SettingsError, before anything is compiled,
    for a bad key, a missing file or a tokenizer without bos or eos.
    """

    CONFIG: ClassVar[type[DuplexSttModelConfig]] = DuplexSttModelConfig
    _blueprint: DuplexSttBlueprint

    @classmethod
    def read_blueprint(
        cls, cfg: Mapping[str, object], near: tuple[Path, ...]
    ) -> DuplexSttBlueprint:
        """Reads configs and tokenizer, no weights."""
        return duplex_stt.read_blueprint(cfg, near)

    @property
    def predict_user_text(self) -> bool:
        """Whether the model has a head for the user's text."""
        return self._blueprint.network.has_user_text

    @property
    def turn_ids(self) -> TextIds:
        """Token ids that start, end and fill the text channels."""
        return self._blueprint.network.text

    def __call__(self, input_embeds: ArrayLike) -> dict[str, jax.Array]:
        """Runs whole conversations of embeddings [B, T, D], with the boosts of inference.

        Returns `text_logits` [B, T, V], and `asr_logits` [B, T, V] with a user-text head.
        """
        found = logits(self._graphdef, self._inference_variables(), jnp.asarray(input_embeds))
        result = {"text_logits": found.text}
        return result if found.user_text is None else {**result, "asr_logits": found.user_text}

    def offline_inference(
        self,
        input_signal: ArrayLike,
        input_signal_lens: ArrayLike | None,
        input_pad_len: int = 0,
        prompt_tokens: ArrayLike | None = None,
        prompt_token_lens: ArrayLike | None = None,
    ) -> dict[str, Any]:
        """Generates the agent's text for user audio [B, S] at `sampling_rate`, greedily.

        `input_signal_lens` [B] are in samples; `input_pad_len` samples of silence are added to
        each. `prompt_tokens` [B, P] are system prompts (`encode_prompts`). The result has NeMo's
        keys:
        - `text`: a string per conversation, with the times of turns if the model's
          `eval_text_turn_taking` is on; `tokens_text` int32 [B, T]; `tokens_len` [B], frames
        - `src_text`, `tokens_text_src`: the same of the user's text, None without its head
        - `source_audio` [B, S] and `source_audio_len` [B]

        Conversations of a batch do not influence each other; a mesh shards them over its devices.
        Raises ValueError for an invalid batch.
        """
        audio, lengths = check_batch(input_signal, input_signal_lens)
        audio, lengths = np.pad(audio, ((0, 0), (0, input_pad_len))), lengths + input_pad_len
        batch = len(audio)
        prompts, prompt_lengths = _checked_prompts(prompt_tokens, prompt_token_lens, batch)
        mesh = sharding.mesh_of(self.variables)
        placement = None if mesh is None else sharding.for_inference(mesh)
        groups = 1 if placement is None else placement.data_parallel_size
        padded, samples = pad_to_static_shape(audio, lengths, groups)
        rows = len(padded)
        output, frames = run_offline(
            self._graphdef,
            self._decoding_variables(),
            padded,
            samples,
            _with_rows(prompts, rows, self.text_pad_id),
            pad_lengths(prompt_lengths, rows),
            self._blueprint.forced_turns,
            placement=placement,
        )
        frames = np.asarray(frames)[:batch]
        text, theirs = (
            _behind(np.asarray(tokens)[:batch], prompt_lengths, frames, self.text_pad_id)
            for tokens in output
        )
        has_user = self.predict_user_text
        return {
            "text": self._texts(text, frames),
            "src_text": self._plain_texts(theirs, frames) if has_user else None,
            "tokens_text": text,
            "tokens_text_src": theirs if has_user else None,
            "tokens_len": frames,
            "source_audio": audio,
            "source_audio_len": lengths,
        }

    def session(
        self,
        *,
        system_prompt: str | None = None,
        sampling_rate: int | None = None,
        session_window_s: float = SESSION_WINDOW_S,
    ) -> SttSession:
        """Starts a conversation: `for frame in session.push(samples)`; one text token per frame.

        `sampling_rate` is that of the samples, by default the model's. A frame attends to the
        system prompt, to the first frames and to the last `session_window_s` seconds. Raises
        ValueError, naming the setting, for a model that cannot stream, for weights on several
        devices and for a window of less than a frame.
        """
        if self.mesh is not None:
            raise ValueError(
                f"a session runs on one device, and the weights lie on {self.mesh.size}; load the "
                "model without `strategy`"
            )
        options = SttSessionOptions(
            tokenizer=self.tokenizer,
            prompt=tuple(self._prompt_ids(system_prompt)),
            input_hz=sampling_rate or self.sampling_rate,
            window_s=session_window_s,
            rule=self._blueprint.forced_turns,
        )
        network = self._blueprint.network
        return SttSession(self._graphdef, network, self._decoding_variables(), options)

    def encode_prompts(self, prompts: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
        """System prompts as `prompt_tokens` int32 [B, P] and `prompt_token_lens` int32 [B]."""
        ids = [self._prompt_ids(prompt) for prompt in prompts]
        tokens = np.full((len(ids), max(map(len, ids), default=0)), self.text_pad_id, np.int32)
        for row, prompt in enumerate(ids):
            tokens[row, : len(prompt)] = prompt
        return tokens, np.array([len(prompt) for prompt in ids], np.int32)

    def _prompt_ids(self, prompt: str | None) -> list[int]:
        if not prompt:
            return []
        return [self.turn_ids.bos, *self.tokenizer.text_to_ids(prompt), self.turn_ids.eos]

    def _texts(self, tokens: np.ndarray, frames: np.ndarray) -> list[str]:
        if not self._blueprint.config.eval_text_turn_taking:
            return self._plain_texts(tokens, frames)
        return timed_texts(tokens, frames, self.tokenizer, pad_id=self.text_pad_id)

    def _plain_texts(self, tokens: np.ndarray, frames: np.ndarray) -> list[str]:
        return channel_texts(tokens, frames, self.tokenizer, pad_id=self.text_pad_id)

    # Interface of the trainer ---------------------------------------------------------------

    @property
    def frame_count(self) -> Callable[[int], int]:
        """Number of samples of the user's audio -> number of frames."""
        return self._blueprint.network.perception.frame_count

    def losses(
        self,
        variables: Variables,
        batch: DuplexSttBatch[jax.Array],
        *,
        key: jax.Array | None,
        train: bool,
    ) -> StepLosses:
        """Computes weighted cross-entropies of both text channels; pure and traceable."""
        network: DuplexStt = merge(self._graphdef, variables)
        modes = DuplexModes()
        if train:
            modes = DuplexModes(perception=self._perception_modes(), llm=self.is_trained("llm."))
        return network_stages.losses(network, batch, modes, key if train else None)

    def flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one training step on `batch`."""
        arrays: DuplexSttBatch[np.ndarray] = batch.arrays
        perception = self._blueprint.network.perception
        count = np.vectorize(lambda n: self.frame_count(int(n)), otypes=[np.int64])
        return duplex_stt_flops(
            self.infos,
            self.trainable,
            count(arrays.source_lengths),
            arrays.prompt_lengths,
            subsampling_factor=perception.encoder.subsampling_factor,
        )

    def count_tokens(self, batch: HostBatch) -> tuple[int, int]:
        """Counts a batch's (positions without padding, positions with padding)."""
        arrays: DuplexSttBatch[np.ndarray] = batch.arrays
        real = int(arrays.token_lengths.sum() + arrays.prompt_lengths.sum())
        return real, int(arrays.target_tokens.size + arrays.prompt_tokens.size)


def _checked_prompts(
    tokens: ArrayLike | None, lengths: ArrayLike | None, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, P] and their lengths [B]. Raises ValueError if they do not fit the batch."""
    if tokens is None:
        return np.zeros((batch, 0), np.int32), np.zeros(batch, np.int32)
    prompts = np.asarray(tokens, np.int32)
    if prompts.ndim != 2 or len(prompts) != batch:
        raise ValueError(f"prompt_tokens: expected [{batch}, P], got {list(prompts.shape)}")
    width = prompts.shape[1]
    counts = np.full(batch, width, np.int32) if lengths is None else np.asarray(lengths, np.int32)
    if counts.shape != (batch,) or (counts < 0).any() or (counts > width).any():
        raise ValueError(
            f"prompt_token_lens: expected {batch} numbers of at most {width}, got {counts.tolist()}"
        )
    return prompts, counts


def _with_rows(prompts: Int[np.ndarray, "B P"], rows: int, pad: int) -> np.ndarray:
    """Pads prompts to `rows`, and to a rounded width if there are any."""
    batch, width = prompts.shape
    room = -(-width // PROMPT_UNIT) * PROMPT_UNIT
    return np.pad(prompts, ((0, rows - batch), (0, room - width)), constant_values=pad)


def _behind(
    tokens: Int[np.ndarray, "B T"],
    prompts: Int[np.ndarray, " B"],
    frames: Int[np.ndarray, " B"],
    pad: int,
) -> Int[np.ndarray, "B F"]:
    """The tokens of the frames, without those of the prompts."""
    result = np.full((len(tokens), int(frames.max(initial=0))), pad, np.int32)
    for row, (first, count) in enumerate(zip(prompts.tolist(), frames.tolist(), strict=True)):
        result[row, :count] = tokens[row, first : first + count]
    return result
