"""ASRModel, the user-facing class for inference with NeMo's CTC, RNN-T, TDT and hybrid models."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.asr.ctc import collapse
from speechlm2_jax.asr.greedy import Hypotheses, decode_greedily
from speechlm2_jax.asr.transducer import TransducerNetwork
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import NemoArchive, read_nemo
from speechlm2_jax.inference.sessions.transcription_session import TranscriptionSession
from speechlm2_jax.inference.timestamps.ctc_aligner import CtcAligner
from speechlm2_jax.inference.timestamps.transducer_aligner import TransducerAligner
from speechlm2_jax.layers.module import Variables, describe, merge, split
from speechlm2_jax.models.transcriber import Transcriber, best_paths
from speechlm2_jax.pretrained.asr import (
    TransducerDecodingConfig,
    choose_decoder,
    outline,
    read_architecture,
    read_decoding,
)
from speechlm2_jax.pretrained.asr_labels import nemo_label_decoder
from speechlm2_jax.pretrained.label_encoder import nemo_label_encoder
from speechlm2_jax.pretrained.registry import find_nemo

PRECISION = "highest"
"""Of matmuls: TPU and GPU default to less, and scores must not depend on the device."""


class ASRModel(Transcriber):
    """A trained ASR model for inference: `transcribe` turns audio into text.

    `decoder` is "rnnt" (RNN-T or TDT) or "ctc".
    """

    SHORTEST_S = 1.0  # as NeMo 3.0.0 does with arrays

    def __init__(
        self, archive: NemoArchive, *, decoder: str, decoding: TransducerDecodingConfig
    ) -> None:
        self.decoder = decoder
        self._limits = decoding.limits
        self._to_text = nemo_label_decoder(archive, decoder)
        architecture = read_architecture(archive, decoder, decoding, len(self._to_text))
        self._preprocessor = architecture.preprocessor
        self._perception = architecture.perception
        self._to_labels = nemo_label_encoder(archive, decoder)
        module, table = outline(architecture)
        loaded = mapping.load(archive.weights, table, describe(module))
        self._graphdef: nnx.GraphDef[Any] = split(module)[0]
        self._variables = {path: jnp.asarray(_fp32(value)) for path, value in loaded.items()}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        decoder: str | None = None,
        decoding: Mapping[str, object] | None = None,
    ) -> "ASRModel":
        """Opens a `.nemo` file, or the one of a hub repository.

        `decoder`: "rnnt" or "ctc" for a hybrid model; the default is "rnnt", as in NeMo.
        `decoding`: keys that override the archive's decoding block. Raises SettingsError for an
        unsupported model or decoding, ConversionError for weights that do not fit.
        """
        archive = read_nemo(find_nemo(cls, path, key="pretrained_asr"))
        chosen = choose_decoder(archive, decoder)
        return cls(archive, decoder=chosen, decoding=read_decoding(archive, chosen, decoding))

    @staticmethod
    def check(path: str | Path) -> None:
        """Raises what `from_pretrained` would raise for a `.nemo` file; reads no weights."""
        archive = read_nemo(Path(path))
        decoder = choose_decoder(archive)
        decoding = read_decoding(archive, decoder)
        labels = len(nemo_label_decoder(archive, decoder))
        module, table = outline(read_architecture(archive, decoder, decoding, labels))
        mapping.check(archive.weights, table, describe(module))

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the input audio in Hz."""
        return self._preprocessor.sample_rate

    def aligner(self) -> CtcAligner | TransducerAligner:
        """The model as what finds the times of words; see `inference.timestamps.word_times`.

        A CTC model aligns every label of a text. A transducer tells the frames of its own
        transcript, which is joined to the text by edit distance.
        """
        assert self._variables is not None
        if self.decoder == "ctc":
            return CtcAligner(
                graphdef=self._graphdef,
                variables=self._variables,
                encoder=self._to_labels,
                sampling_rate=self.sampling_rate,
                frame_samples=self._perception.frame_samples,
                precision=PRECISION,
            )
        return TransducerAligner(
            decode=partial(self._hypotheses_of, keeps_log_probs=True),
            encoder=self._to_labels,
            sampling_rate=self.sampling_rate,
            frame_samples=self._perception.frame_samples,
        )

    def session(
        self, *, sampling_rate: int | None = None, context: tuple[int, int] | None = None
    ) -> TranscriptionSession:
        """Starts a live transcription by a CTC head, as `CTCModel.session`.

        Recordings under a second are not padded, unlike in `transcribe`. Raises ValueError for an
        encoder that needs whole recordings, and for a transducer: its greedy decoding is offline.
        """
        if self.decoder != "ctc":
            raise ValueError(
                "this model has no sessions: a transducer decodes whole recordings here; a hybrid "
                'model has a CTC head too: ASRModel.from_pretrained(path, decoder="ctc")'
            )
        assert self._variables is not None
        return TranscriptionSession(
            *(self._graphdef, self._variables, self._perception),
            *(self._to_text, len(self._to_text), sampling_rate or self.sampling_rate, context),
        )

    def _hypotheses_of(
        self, audio: np.ndarray, lengths: np.ndarray, keeps_log_probs: bool = False
    ) -> Hypotheses:
        """The labels of a transducer, with their frames."""
        inputs = self._graphdef, self._variables, jnp.asarray(audio), jnp.asarray(lengths)
        return _hypotheses(*inputs, **self._limits, keeps_log_probs=keeps_log_probs)

    def _decode(self, audio: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        if self.decoder == "ctc":
            inputs = self._graphdef, self._variables, jnp.asarray(audio), jnp.asarray(lengths)
            blank = len(self._to_text)
            return [collapse(path, blank) for path in np.asarray(best_paths(*inputs, PRECISION))]
        found = self._hypotheses_of(audio, lengths)
        pairs = zip(np.asarray(found.labels), np.asarray(found.lengths), strict=True)
        return [labels[:count].tolist() for labels, count in pairs]


@partial(jax.jit, static_argnames=("graphdef", "max_symbols", "jumps_when_full", "keeps_log_probs"))
def _hypotheses(
    graphdef: nnx.GraphDef[TransducerNetwork],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    max_symbols: int,
    jumps_when_full: bool,
    keeps_log_probs: bool,
) -> Hypotheses:
    with jax.default_matmul_precision(PRECISION):
        network: TransducerNetwork = merge(graphdef, variables)
        output = network(audio, lengths)
        return decode_greedily(
            network,
            output.frames,
            output.lengths,
            max_symbols=max_symbols,
            jumps_when_full=jumps_when_full,
            keeps_log_probs=keeps_log_probs,
        )


def _fp32(value: AnyArray) -> AnyArray:
    """Floating-point weights in fp32, whatever the archive's dtype."""
    return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)
