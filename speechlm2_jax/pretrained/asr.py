"""A `.nemo` file of an ASR model -> decoder, decoding settings and architecture; no weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from flax import nnx

from speechlm2_jax.asr.ctc import CtcConfig, CtcNetwork
from speechlm2_jax.asr.greedy import DecodingLimits
from speechlm2_jax.asr.transducer import TransducerConfig, TransducerNetwork
from speechlm2_jax.conversion.ctc import ctc_table
from speechlm2_jax.conversion.mapping import Table
from speechlm2_jax.conversion.readers import NemoArchive
from speechlm2_jax.conversion.transducer import transducer_table
from speechlm2_jax.layers.module import abstract
from speechlm2_jax.pretrained.asr_labels import class_name
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

    @property
    def limits(self) -> DecodingLimits:
        """The keyword arguments of `decode_greedily`."""
        return {
            "max_symbols": self.max_symbols or MAX_SYMBOLS,
            "jumps_when_full": self.strategy == "greedy" and self.max_symbols is not None,
        }


def choose_decoder(archive: NemoArchive, asked: str | None = None) -> str:
    """The decoder of an archive's model to use: `asked`, or NeMo's default.

    Raises SettingsError for a model that is not supported, or that lacks the decoder.
    """
    name = class_name(archive)
    if name not in DECODERS:
        raise SettingsError(
            f"{archive.path}: {name} is not a supported ASR model; use one of {', '.join(DECODERS)}"
        )
    if asked is not None and asked not in DECODERS[name]:
        raise SettingsError(f"decoder={asked!r}: {name} has only {' and '.join(DECODERS[name])}")
    return asked or DECODERS[name][0]


def read_decoding(
    archive: NemoArchive, decoder: str, overrides: Mapping[str, object] | None = None
) -> TransducerDecodingConfig:
    """The decoding block of a decoder, without keys that greedy decoding does not use.

    Raises SettingsError for a strategy that is not supported.
    """
    is_auxiliary = decoder == "ctc" and "aux_ctc" in archive.config
    block = archive.config["aux_ctc"] if is_auxiliary else archive.config
    given = {**(block.get("decoding") or {}), **(overrides or {})}
    greedy = given.get("greedy") or {}
    known = {key: given[key] for key in _DECODING_KEYS if key in given}
    known["max_symbols"] = greedy.get("max_symbols") or greedy.get("max_symbols_per_step")
    return build(TransducerDecodingConfig, known, "decoding")


def read_architecture(
    archive: NemoArchive, decoder: str, decoding: TransducerDecodingConfig, pieces: int
) -> CtcConfig | TransducerConfig:
    """The network; of a hybrid model either the CTC head alone or everything.

    `pieces` is the number of labels. Raises SettingsError for a config that does not fit them.
    """
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


def outline(architecture: CtcConfig | TransducerConfig) -> tuple[nnx.Module, Table]:
    """The network without weights, and the table of NeMo's parameter names."""
    if isinstance(architecture, TransducerConfig):
        made = abstract(lambda rngs: TransducerNetwork(architecture, rngs=rngs))
        return made, transducer_table(architecture)
    made = abstract(lambda rngs: CtcNetwork(architecture, rngs=rngs))
    return made, ctc_table(architecture.perception)
