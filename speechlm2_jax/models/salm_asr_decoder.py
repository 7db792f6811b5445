"""SALMWithAsrDecoder, the user-facing class: a SALM that also reads its own ASR transcript."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from speechlm2_jax import processes
from speechlm2_jax.batches import HostBatch, SalmBatch, insert_after_clips
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.transcribe import Transcript, read_recordings
from speechlm2_jax.inference.transcripts import ClipTranscriber, TranscriptFormat
from speechlm2_jax.layers.module import Variables, merge
from speechlm2_jax.models.salm import SALM
from speechlm2_jax.networks.salm import Salm, SalmModes
from speechlm2_jax.networks.transcripts import Transcripts, transcribe
from speechlm2_jax.pretrained import salm_asr_decoder
from speechlm2_jax.pretrained.salm_asr_decoder import SalmAsrDecoderBlueprint
from speechlm2_jax.pretrained.salm_config import SalmAsrDecoderModelConfig

TOKENS_MULTIPLE = 32
"""Training sequences that outgrow their bucket get a length of so many tokens, or a multiple."""
SIZES_PER_BUCKET = 8
"""The multiple is at least the bucket's length divided by it, so that few programs are compiled."""
_OF_ASR = re.compile(r"perception(\\?\.)(encoder|preprocessor)\b")


class SALMWithAsrDecoder(SALM):
    """A SALM whose encoder is that of an ASR model; its transcript follows each clip's frames.

    After the frames come the tokens of `>> transcript <<`, decoded greedily by the transducer of
    `pretrained_asr` (RNN-T, TDT, or a hybrid's), in training too. The rest is as in `SALM`.
    """

    CONFIG: ClassVar[type[SalmAsrDecoderModelConfig]] = SalmAsrDecoderModelConfig
    ALWAYS_FROZEN = (r"^perception\.asr\.(decoder|joint|ctc_decoder)\..+$",)
    _blueprint: SalmAsrDecoderBlueprint

    @classmethod
    def read_blueprint(
        cls, cfg: Mapping[str, Any], near: tuple[Path, ...]
    ) -> SalmAsrDecoderBlueprint:
        """Reads configs and tokenizers, no weights."""
        return salm_asr_decoder.read_blueprint(cfg, near)

    def asr_transcribe(self, audio: Any, lengths: Any = None) -> list[Transcript]:
        """Transcribes recordings with the ASR model alone; each text is a str that has `text`.

        `audio`: a path, an array [S] at `sampling_rate`, `(rate, array)`, a list of these, or a
        batch [B, S] with `lengths` [B] in samples. Raises AudioError for an unusable recording,
        ValueError for any other value.
        """
        waves = read_recordings(audio, lengths, self.sampling_rate)
        transcriber = self._transcriber(super()._engine())
        return [Transcript(text) for text in transcriber.texts(waves)]

    def derive(
        self,
        variables: Variables,
        batch: SalmBatch[jax.Array],
        *,
        key: jax.Array | None,
        train: bool,
    ) -> Transcripts[jax.Array]:
        """Transcribes the clips of a training batch; pure and traceable."""
        network: Salm = merge(self._graphdef, variables)
        modes = self._training_modes() if train else SalmModes()
        probability = self._blueprint.config.asr_transcript_drop_prob if train else 0.0
        limits = self._blueprint.asr.decoding.limits
        return transcribe(network, batch, modes, key if train else None, limits, probability)

    def complete(
        self, batch: HostBatch, derived: Transcripts[np.ndarray], multiple: int
    ) -> HostBatch:
        """Puts the tokens of the transcripts after the clips of a batch.

        Sequences may become longer than their bucket; no transcript is cut.
        """
        arrays: SalmBatch[np.ndarray] = batch.arrays
        own, to_text = self._transcript_format, self._blueprint.asr.to_text
        texts = [
            [
                own.tokens_of(to_text(labels[:count].tolist()) if count else "")
                for labels, count in zip(*group, strict=True)
            ]
            for group in zip(derived.labels, derived.lengths, strict=True)
        ]
        planned = arrays.tokens.shape[2]
        completed = insert_after_clips(
            arrays,
            texts,
            frames=self._blueprint.network.perception.frame_capacity(arrays.audio.shape[2]),
            size=lambda longest: grown_length(processes.largest(longest), planned, multiple),
        )
        return replace(batch, arrays=completed)

    def _engine(self) -> Engine:
        engine = super()._engine()
        return replace(engine, transcripts=self._transcriber(engine).tokens)

    def _transcriber(self, engine: Engine) -> ClipTranscriber:
        return ClipTranscriber(
            graphdef=engine.graphdef,
            variables=engine.variables,
            placement=engine.placement,
            format=self._transcript_format,
        )

    @property
    def _transcript_format(self) -> TranscriptFormat:
        asr = self._blueprint.asr
        return TranscriptFormat(
            to_text=asr.to_text, tokenizer=self.tokenizer, limits=asr.decoding.limits
        )

    def _freeze_patterns(self) -> tuple[list[str], list[str]]:
        # NeMo's own YAML freezes perception.encoder, a name that its parameters do not have
        freeze, prevent = super()._freeze_patterns()
        named = [[_OF_ASR.sub(r"perception\1asr\1\2", p) for p in own] for own in (freeze, prevent)]
        return named[0], named[1]


def grown_length(longest: int, planned: int, multiple: int) -> int:
    """The length of a batch whose longest sequence has `longest` tokens, planned for `planned`.

    So 1,030 tokens, planned for 1,000, get 1,096.
    """
    if longest <= planned:
        return planned
    unit = math.lcm(TOKENS_MULTIPLE, multiple)
    step = unit * max(1, planned // (SIZES_PER_BUCKET * unit))
    return planned + -(-(longest - planned) // step) * step
