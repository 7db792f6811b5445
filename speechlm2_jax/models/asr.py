"""ASRModel, the user-facing class for inference with NeMo's CTC, RNN-T, TDT and hybrid models."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.asr.ctc import CtcConfig, CtcNetwork, collapse
from speechlm2_jax.asr.greedy import Hypotheses, decode_greedily
from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.ctc import ctc_table
from speechlm2_jax.conversion.readers import NemoArchive, read_nemo
from speechlm2_jax.conversion.transducer import transducer_table
from speechlm2_jax.inference.asr_labels import class_name, nemo_label_decoder
from speechlm2_jax.layers.module import Variables, abstract, describe, merge, split
from speechlm2_jax.models.transcriber import Transcriber, best_paths
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
"""NeMo's class -> its decoders, the default first; TDT counts as RNN-T."""
MAX_SYMBOLS = 10
"""Default maximum of labels that a transducer emits per frame."""
_DECODING_KEYS = ("strategy", "durations", "big_blank_durations")
PRECISION = "highest"
"""Of matmuls: TPU and GPU default to less, and scores must not depend on the device."""


@dataclass(frozen=True, kw_only=True)
class TransducerDecodingConfig:
    """NeMo's `decoding` block, as far as it changes a greedy transcript."""

    REFUSED: ClassVar[Mapping[str, str]] = {
        "big_blank_durations": "transducers with several blanks are not supported",
    }

    strategy: str = "greedy_batch"
    durations: tuple[int, ...] | None = None
    """Durations of a TDT model."""
    max_symbols: int | None = None
    """Maximum labels per frame; null means MAX_SYMBOLS (in NeMo: no limit)."""

    def __post_init__(self) -> None:
        if self.strategy not in ("greedy", "greedy_batch"):
            raise ValueError(
                f"strategy={self.strategy!r} is not supported; to decode greedily instead, pass "
                'decoding={"strategy": "greedy_batch"}'
            )
        if self.max_symbols is not None and self.max_symbols < 1:
            raise ValueError(f"max_symbols={self.max_symbols} must be positive")


class ASRModel(Transcriber):
    """A trained ASR model for inference: `transcribe` turns audio into text.

    `decoder` is "rnnt" (RNN-T or TDT) or "ctc".
    """

    SHORTEST_S = 1.0  # as NeMo 3.0.0 does with arrays

    def __init__(
        self, archive: NemoArchive, *, decoder: str, decoding: TransducerDecodingConfig
    ) -> None:
        self.decoder = decoder
        self._max_symbols = decoding.max_symbols or MAX_SYMBOLS
        self._jumps_when_full = decoding.strategy == "greedy" and decoding.max_symbols is not None
        self._to_text = nemo_label_decoder(archive, decoder)
        architecture = _architecture(archive, decoder, decoding, len(self._to_text))
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
        decoding: Mapping[str, object] | None = None,
    ) -> "ASRModel":
        """Opens a `.nemo` file, or the one of a hub repository.

        `decoder`: "rnnt" or "ctc" for a hybrid model; the default is "rnnt", as in NeMo.
        `decoding`: keys that override the archive's decoding block. Raises SettingsError for an
        unsupported model or decoding, ConversionError for weights that do not fit.
        """
        archive = read_nemo(find_nemo(cls, path, key="pretrained_asr"))
        chosen = _decoder(archive, decoder)
        return cls(archive, decoder=chosen, decoding=_decoding(archive, chosen, decoding or {}))

    @staticmethod
    def check(path: str | Path) -> None:
        """Raises what `from_pretrained` would raise for a `.nemo` file; reads no weights."""
        archive = read_nemo(Path(path))
        decoder = _decoder(archive, None)
        decoding = _decoding(archive, decoder, {})
        labels = len(nemo_label_decoder(archive, decoder))
        module, table = _network(_architecture(archive, decoder, decoding, labels))
        mapping.check(archive.weights, table, describe(module))

    @property
    def sampling_rate(self) -> int:
        """Sampling rate of the input audio in Hz."""
        return self._preprocessor.sample_rate

    def _decode(self, audio: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
        inputs = self._graphdef, self._variables, jnp.asarray(audio), jnp.asarray(lengths)
        if self.decoder == "ctc":
            blank = len(self._to_text)
            return [collapse(path, blank) for path in np.asarray(best_paths(*inputs, PRECISION))]
        limits = {"max_symbols": self._max_symbols, "jumps_when_full": self._jumps_when_full}
        found = _hypotheses(*inputs, **limits)
        pairs = zip(np.asarray(found.labels), np.asarray(found.lengths), strict=True)
        return [labels[:count].tolist() for labels, count in pairs]


@partial(jax.jit, static_argnames=("graphdef", "max_symbols", "jumps_when_full"))
def _hypotheses(
    graphdef: nnx.GraphDef[TransducerNetwork],
    variables: Variables,
    audio: Float[Array, "B S"],
    lengths: Int[Array, " B"],
    max_symbols: int,
    jumps_when_full: bool,
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
        )


def _decoder(archive: NemoArchive, asked: str | None) -> str:
    """The decoder of the archive's model to use."""
    name = class_name(archive)
    if name not in DECODERS:
        raise SettingsError(
            f"{archive.path}: {name} is not a supported ASR model; use one of {', '.join(DECODERS)}"
        )
    if asked is not None and asked not in DECODERS[name]:
        raise SettingsError(f"decoder={asked!r}: {name} has only {' and '.join(DECODERS[name])}")
    return asked or DECODERS[name][0]


def _decoding(
    archive: NemoArchive, decoder: str, overrides: Mapping[str, object]
) -> TransducerDecodingConfig:
    """The decoding block of the chosen decoder, without keys that greedy decoding does not use."""
    is_auxiliary = decoder == "ctc" and "aux_ctc" in archive.config
    block = archive.config["aux_ctc"] if is_auxiliary else archive.config
    given = {**(block.get("decoding") or {}), **overrides}
    greedy = given.get("greedy") or {}
    known = {key: given[key] for key in _DECODING_KEYS if key in given}
    known["max_symbols"] = greedy.get("max_symbols") or greedy.get("max_symbols_per_step")
    return build(TransducerDecodingConfig, known, "decoding")


def _architecture(
    archive: NemoArchive, decoder: str, decoding: TransducerDecodingConfig, pieces: int
) -> CtcConfig | TransducerConfig:
    """The network; of a hybrid model either the CTC head alone or everything."""
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
            f"{archive.path}: its tokenizer has {pieces} labels, but its decoder {network.blank}"
        )
    return network


def _network(architecture: CtcConfig | TransducerConfig) -> tuple[nnx.Module, mapping.Table]:
    """The network without weights, and the table of NeMo's parameter names."""
    if isinstance(architecture, TransducerConfig):
        made = abstract(lambda rngs: TransducerNetwork(architecture, rngs=rngs))
        return made, transducer_table(architecture)
    made = abstract(lambda rngs: CtcNetwork(architecture, rngs=rngs))
    return made, ctc_table(architecture.perception)


def _fp32(value: AnyArray) -> AnyArray:
    """Floating-point weights in fp32, whatever the archive's dtype."""
    return value if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)
