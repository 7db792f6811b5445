"""A recogniser to write down speech with, whatever NeMo made it: CTC, RNN-T, TDT or hybrid."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.asr.ctc import CtcConfig, CtcNetwork, best_path, collapse
from speechlm2_jax.asr.greedy import Hypotheses, decode_greedily
from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.ctc import ctc_table
from speechlm2_jax.conversion.readers import NemoArchive, read_nemo
from speechlm2_jax.conversion.transducer import transducer_table
from speechlm2_jax.inference import stages
from speechlm2_jax.inference.asr_labels import class_name, nemo_speller
from speechlm2_jax.inference.transcribe import (
    ROWS_AT_ONCE,
    Transcript,
    check_options,
    recordings_of,
    transcribe,
)
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.pretrained.registry import find_nemo
from speechlm2_jax.settings import SettingsError, build

DECODERS = {
    "EncDecCTCModel": ("ctc",),
    "EncDecCTCModelBPE": ("ctc",),
    "EncDecRNNTModel": ("rnnt",),
    "EncDecRNNTBPEModel": ("rnnt",),
    "EncDecHybridRNNTCTCModel": ("rnnt", "ctc"),
    "EncDecHybridRNNTCTCBPEModel": ("rnnt", "ctc"),
}
"""NeMo's class -> the decoders that it has, its own choice first; TDT counts as RNN-T."""
MAX_SYMBOLS = 10
_DECODING_KEYS = ("strategy", "durations", "big_blank_durations")
SHORTEST_S = 1.0
"""What is shorter is padded with silence on both sides, as NeMo 3.0.0 does with arrays."""


@dataclass(frozen=True, kw_only=True)
class TransducerDecodingConfig:
    """NeMo's `decoding` block, as far as it changes a greedy transcript."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "big_blank_durations": "transducers with several blanks are not done",
    }

    strategy: str = "greedy_batch"
    durations: tuple[int, ...] | None = None
    """Of a TDT model."""
    max_symbols: int | None = None
    """Labels at one frame; null, in NeMo without a limit, means MAX_SYMBOLS."""

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "greedy_batch"):
            raise ValueError(
                f"strategy={self.strategy!r} is not done; to decode greedily all the same, pass "
                'decoding={"strategy": "greedy_batch"}'
            )
        if self.max_symbols is not None and self.max_symbols < 1:
            raise ValueError(f"max_symbols={self.max_symbols} must be positive")


class ASRModel:
    """A trained recogniser: `transcribe` turns audio into text. It is not for training.

    `decoder` is "rnnt" (RNN-T or TDT) or "ctc". Nothing but the object holds its weights.
    """

    def __init__(
        self, archive: NemoArchive, *, decoder: str, decoding: TransducerDecodingConfig
    ) -> None:
        self.decoder = decoder
        self._max_symbols = decoding.max_symbols or MAX_SYMBOLS
        self._jumps_when_full = decoding.strategy == "greedy" and decoding.max_symbols is not None
        self._spell = nemo_speller(archive, decoder)
        architecture = _architecture(archive, decoder, decoding, len(self._spell))
        self._preprocessor = architecture.preprocessor
        module, table = _network(architecture)
        loaded = mapping.load(archive.weights, table, describe(module))
        self._graphdef = split(module)[0]
        self._variables = {path: jnp.asarray(_fp32(value)) for path, value in loaded.items()}

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        decoder: str | None = None,
        decoding: Mapping[str, Any] | None = None,
    ) -> "ASRModel":
        """Opens a `.nemo` file, or the one of a hub repository.

        `decoder`: "rnnt" or "ctc", for hybrid models, which by themselves take "rnnt" as in NeMo.
        `decoding`: keys that override the archive's decoding block. Raises SettingsError for a
        model or a decoding that is not done, ConversionError for weights that do not fit.
        """
        archive = read_nemo(find_nemo(cls, path, key="pretrained_asr"))
        chosen = _decoder(archive, decoder)
        return cls(archive, decoder=chosen, decoding=_decoding(archive, chosen, decoding or {}))

    @staticmethod
    def check(path: str | Path) -> None:
        """Raises what `from_pretrained` would raise for a `.nemo` file; reads no weight's value."""
        archive = read_nemo(Path(path))
        decoder = _decoder(archive, None)
        decoding = _decoding(archive, decoder, {})
        labels = len(nemo_speller(archive, decoder))
        module, table = _network(_architecture(archive, decoder, decoding, labels))
        mapping.check(archive.weights, table, describe(module))

    @property
    def device(self) -> jax.Device:
        """The device that the model runs on, the first of several. Inputs may come from any."""
        return stages.device_of(self._variables)

    @property
    def sampling_rate(self) -> int:
        """Samples per second that the model hears."""
        return self._preprocessor.sample_rate

    def transcribe(
        self,
        audio: Any,
        lengths: Any = None,
        *,
        batch_size: int = ROWS_AT_ONCE,
        channel_selector: int | str | None = None,
        **options: Any,
    ) -> list[Transcript]:
        """Transcribes recordings, in input order; each text is a str that also has `text`.

        `audio`: a path, an array [S] at `sampling_rate`, `(rate, array)` or a dict of datasets, a
        list of these, or a batch float [B, S] with `lengths` [B] (without, the rows are full; a row
        of length 0 gives ""). `channel_selector` chooses a channel of files with several, "average"
        mixes them. The order, padding and neighbours of recordings change no text; `options` are
        NeMo's arguments without effect on it (verbose, num_workers, use_lhotse). Raises AudioError
        for a recording that cannot be used, ValueError for what is none and for a length beyond S.
        """
        check_options(options)
        shortest = int(SHORTEST_S * self.sampling_rate)
        waves = recordings_of(audio, lengths, self.sampling_rate, channel_selector)
        padded = [_centred(wave, shortest) if len(wave) else wave for wave in waves]
        return transcribe(padded, self._decode, self._spell, batch_size)

    def _decode(self, audio: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        inputs = self._graphdef, self._variables, jnp.asarray(audio), jnp.asarray(lengths)
        if self.decoder == "ctc":
            blank = len(self._spell)
            return [collapse(path, blank) for path in np.asarray(_ctc_paths(*inputs))]
        limits = {"max_symbols": self._max_symbols, "jumps_when_full": self._jumps_when_full}
        found = _hypotheses(*inputs, **limits)
        rows = zip(np.asarray(found.labels), np.asarray(found.lengths), strict=True)
        return [labels[:count].tolist() for labels, count in rows]


# fp32 products on every machine: scores must not depend on where they were computed


@partial(jax.jit, static_argnames=("graphdef",))
def _ctc_paths(
    graphdef: Any, variables: Any, audio: Float[Array, "B S"], lengths: Int[Array, " B"]
) -> Int[Array, "B T"]:
    with jax.default_matmul_precision("highest"):
        network = merge(graphdef, variables)
        output = network(audio, lengths)
        return best_path(network.logits(output.frames), output.lengths)


@partial(jax.jit, static_argnames=("graphdef", "max_symbols", "jumps_when_full"))
def _hypotheses(
    graphdef: Any,
    variables: Any,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    max_symbols: int,
    jumps_when_full: bool,
) -> Hypotheses:
    with jax.default_matmul_precision("highest"):
        network: TransducerNetwork = merge(graphdef, variables)
        output = network(audio, lengths)
        return decode_greedily(
            network,
            output.frames,
            output.lengths,
            max_symbols=max_symbols,
            jumps_when_full=jumps_when_full,
        )


def _decoder(archive: NemoArchive, asked: str | None) -> str:
    """Which decoder of the archive's model to use."""
    name = class_name(archive)
    if name not in DECODERS:
        raise SettingsError(
            f"{archive.path}: {name} is no recogniser that is done; it can be {', '.join(DECODERS)}"
        )
    if asked is not None and asked not in DECODERS[name]:
        raise SettingsError(f"decoder={asked!r}: {name} has {' and '.join(DECODERS[name])}")
    return asked or DECODERS[name][0]


def _decoding(
    archive: NemoArchive, decoder: str, overrides: Mapping[str, Any]
) -> TransducerDecodingConfig:
    """The decoding block of the chosen decoder, without what a greedy transcript does not need."""
    is_auxiliary = decoder == "ctc" and "aux_ctc" in archive.config
    place = archive.config["aux_ctc"] if is_auxiliary else archive.config
    given = {**(place.get("decoding") or {}), **overrides}
    greedy = given.get("greedy") or {}
    known = {key: given[key] for key in _DECODING_KEYS if key in given}
    known["max_symbols"] = greedy.get("max_symbols") or greedy.get("max_symbols_per_step")
    return build(TransducerDecodingConfig, known, "decoding")


def _architecture(
    archive: NemoArchive, decoder: str, decoding: TransducerDecodingConfig, pieces: int
) -> CtcConfig | TransducerConfig:
    """The network; a hybrid model's has either the CTC head alone or everything."""
    config = archive.config
    keys = ("preprocessor", "encoder") + (() if decoder == "ctc" else ("decoder", "joint"))
    missing = [key for key in keys if not config.get(key)]
    if missing:
        raise SettingsError(f"{archive.path}: its config has no {missing[0]}")
    blocks = {key: config[key] for key in keys}
    if decoder == "ctc":
        return build(CtcConfig, {**blocks, "vocab_size": pieces}, "model")
    more = {"durations": decoding.durations or (), "has_ctc_head": "aux_ctc" in config}
    network = build(TransducerConfig, {**blocks, **more}, "model")
    if network.blank != pieces:
        raise SettingsError(
            f"{archive.path}: it can spell {pieces} labels, its decoder has {network.blank}"
        )
    return network


def _network(architecture: CtcConfig | TransducerConfig) -> tuple[nnx.Module, mapping.Table]:
    """The network without weights, and NeMo's names of them."""
    if isinstance(architecture, TransducerConfig):
        made = abstract(lambda: TransducerNetwork(architecture, rngs=nnx.Rngs(0)))
        return made, transducer_table(architecture)
    made = abstract(lambda: CtcNetwork(architecture, rngs=nnx.Rngs(0)))
    return made, ctc_table(architecture.perception)


def _centred(wave: np.ndarray, shortest: int) -> np.ndarray:
    """The recording with silence on both sides, the odd sample after it, to `shortest` samples."""
    missing = max(shortest - len(wave), 0)
    return np.pad(wave, (missing // 2, missing - missing // 2))


def _fp32(value: np.ndarray) -> np.ndarray:
    """Floating-point weights in fp32, whatever the archive's dtype."""
    return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)
