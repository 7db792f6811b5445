"""Which class opens a run, a saved directory, a `.nemo` file, a `.ckpt`, or a `model:` block.

Every program and every `from_pretrained` uses this registry, so that all agree. Names in files
select from the tables below; nothing is imported by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from speechlm2_jax.checkpointing import CHECKPOINTS
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import (
    find_gguf,
    is_distributed,
    lightning_file,
    read_json,
    read_nemo,
)
from speechlm2_jax.conversion.readers.nemo import CONFIG as NEMO_CONFIG
from speechlm2_jax.conversion.readers.torch_files import read_hyper_parameters
from speechlm2_jax.conversion.readers.yaml_text import MAX_BYTES, read_yaml
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.pretrained.salm_config import TRANSCRIBING
from speechlm2_jax.settings import SettingsError

CONFIG = "config.json"
RUN_DEFINITION = "model"
"""Folder of a run directory with everything of the model but its weights."""
SPEECH_MODELS = (
    *("SALM", "SALMWithAsrDecoder"),
    *("DuplexS2SModel", "DuplexS2SSpeechDecoderModel", "DuplexSTTModel"),
)
"""Classes with an LLM; their `save_pretrained` writes a directory."""
TRAINABLE = (*SPEECH_MODELS, "CTCModel")
STT_KEYS = frozenset({"source_sample_rate", "predict_user_text"})
"""Keys of a `model:` block that only a duplex speech-to-text model has; NeMo requires the first."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a checkpoint is, and which class opens it."""

    what: str
    """A short description with its article, as "a SALM"."""
    classes: tuple[str, ...] = ()
    """Names in `slm.models` of the classes that open it, the usual one first."""
    advice: str = ""
    """What to do with it where no class opens it."""
    is_llm: bool = False
    """Whether it is an LLM without a speech encoder."""

    def sentence(self, path: str | Path) -> str:
        """One line: what `path` is and what to do with it."""
        opened = " or ".join(f"slm.models.{name}.from_pretrained" for name in self.classes)
        return f"{path} is {self.what}; " + (f"open it with {opened}" if opened else self.advice)


SALM = Kind(what="a SALM", classes=("SALM",))
SALM_WITH_ASR = Kind(what="a SALM with an ASR decoder", classes=("SALMWithAsrDecoder",))
DUPLEX = Kind(what="a full-duplex model", classes=("DuplexS2SModel",))
DUPLEX_WITH_DECODER = Kind(
    what="a full-duplex model with a speech decoder", classes=("DuplexS2SSpeechDecoderModel",)
)
DUPLEX_STT = Kind(what="a duplex speech-to-text model", classes=("DuplexSTTModel",))
DUPLEX_MODELS = (DUPLEX, DUPLEX_WITH_DECODER)
CODEC = Kind(what="an audio codec", classes=("AudioCodec",))
_ASR_ALONE = ("ASRModel",)
_ASR_OR_CTC = ("ASRModel", "CTCModel")
CTC_RUN = Kind(what="a training run of a CTC model", classes=("CTCModel",))
WEIGHTS_ALONE = Kind(
    what="a file of weights without a configuration",
    advice="name the directory that holds it, with its config.json",
)
DISTRIBUTED_ALONE = Kind(
    what="a torch distributed checkpoint without a configuration",
    advice="copy the config.json of its model into it",
)
GGUF = Kind(
    what="an LLM as a GGUF file, without a speech encoder",
    advice="name it in model.pretrained_llm of a training configuration",
    is_llm=True,
)
_BY_TARGET: Mapping[str, Kind] = {
    "SALM": SALM,
    "SALMAutomodel": SALM,
    "SALMWithAsrDecoder": SALM_WITH_ASR,
    "DuplexS2SModel": DUPLEX,
    "DuplexS2SSpeechDecoderModel": DUPLEX_WITH_DECODER,
    "DuplexSTTModel": DUPLEX_STT,
    "AudioCodecModel": CODEC,
    **{
        name: Kind(what=f"an ASR model ({name})", classes=classes)
        for name, classes in (
            ("EncDecCTCModel", _ASR_ALONE),
            ("EncDecCTCModelBPE", _ASR_OR_CTC),
            ("EncDecRNNTModel", _ASR_ALONE),
            ("EncDecRNNTBPEModel", _ASR_ALONE),
            ("EncDecHybridRNNTCTCModel", _ASR_ALONE),
            ("EncDecHybridRNNTCTCBPEModel", _ASR_OR_CTC),
        )
    },
}
"""By the last component of the class that NeMo's `target` or `_target_` names."""


def of_target(name: str) -> Kind:
    """The kind of checkpoint that NeMo's class `name` (dotted or not) saves."""
    last = name.rpartition(".")[2]
    other = Kind(
        what=f"a NeMo model of class {last}",
        advice="no class here opens it whole; if it has a FastConformer encoder, name it in "
        "model.pretrained_asr of a training configuration",
    )
    return _BY_TARGET.get(last, other)


def of_config(cfg: Mapping[str, object]) -> Kind | None:
    """The kind of a `model:` block or config.json; None if unknown.

    `_target_` decides; without it, keys that only one kind has.
    """
    target = cfg.get("_target_", cfg.get("target"))
    if isinstance(target, str):
        return of_target(target)
    if "pretrained_audio_codec" in cfg:
        return DUPLEX_WITH_DECODER if "speech_decoder" in cfg else DUPLEX
    if "pretrained_llm" in cfg and STT_KEYS & cfg.keys():
        return DUPLEX_STT
    if "pretrained_llm" in cfg:
        return _of_perception(cfg["perception"]) if "perception" in cfg else None
    if "tokenizer" in cfg and {"preprocessor", "encoder"} <= cfg.keys():
        return CTC_RUN
    return _of_hugging_face(cfg)


def _of_perception(block: object) -> Kind:
    """The kind of SALM that has a perception block."""
    own = cast(Mapping[str, object], block) if isinstance(block, Mapping) else {}
    target = str(own.get("_target_", own.get("target")))
    transcribes = target.rpartition(".")[2] == TRANSCRIBING or "asr" in own
    return SALM_WITH_ASR if transcribes else SALM


def _of_hugging_face(cfg: Mapping[str, object]) -> Kind | None:
    """The kind of a config.json of transformers; None for another file."""
    family, classes = cfg.get("model_type"), cfg.get("architectures")
    if not isinstance(family, str) or family.startswith("nemo_speechlm"):
        return None
    named = str(classes[0]) if isinstance(classes, list) and classes else "ForCausalLM"
    if named.endswith(("ForCausalLM", "Model")):
        advice = "name it in model.pretrained_llm of a training configuration"
        what = f"a Hugging Face LLM ({family}) without a speech encoder"
        return Kind(what=what, advice=advice, is_llm=True)
    return Kind(
        what=f"a Hugging Face model of class {named}",
        advice="no class here opens it; give a NeMo model, or a directory of save_pretrained",
    )


def identify(path: Path) -> Kind | None:
    """The kind of a local file or directory; None if unknown. Reads no weights.

    Raises ConversionError for a damaged or malicious file.
    """
    if path.is_file():
        return _of_file(path)
    if is_run(path):
        return _of_json(path / RUN_DEFINITION / CONFIG)
    if (path / CONFIG).is_file():
        return _of_json(path / CONFIG)
    if is_distributed(path):
        return _of_lightning(path) or DISTRIBUTED_ALONE
    if find_gguf(path) is not None:
        return GGUF
    if (path / NEMO_CONFIG).is_file():
        return _of_unpacked(path)
    archives = sorted(path.glob("*.nemo"))
    return _of_file(archives[0]) if len(archives) == 1 else None


def is_run(path: Path) -> bool:
    """Whether a path is a run directory."""
    return (path / CHECKPOINTS).is_dir()


def _of_file(path: Path) -> Kind | None:
    if path.suffix == ".nemo":
        return of_config(read_nemo(path).config)
    if path.suffix == ".ckpt":
        return _of_lightning(path) or WEIGHTS_ALONE
    if find_gguf(path) is not None:
        return GGUF
    is_weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth")
    return WEIGHTS_ALONE if is_weights else None


def _of_lightning(path: Path) -> Kind | None:
    """The kind of a Lightning checkpoint, a file or a folder; None if it has no configuration."""
    file = lightning_file(path)
    cfg = None if file is None else read_hyper_parameters(file).get("cfg")
    return of_config(cfg) if isinstance(cfg, dict) else None


def _of_json(path: Path) -> Kind | None:
    try:
        return of_config(read_json(path))
    except ConversionError:  # missing or damaged: reported where its content is read
        return None


def _of_unpacked(directory: Path) -> Kind | None:
    """A directory that convert.py unpacked from a .nemo file."""
    file = directory / NEMO_CONFIG
    with file.open("rb") as opened:
        kind = of_config(read_yaml(opened.read(MAX_BYTES + 1), str(file)))
    if kind is None:
        return None
    opener = " or ".join(f"slm.models.{name}" for name in kind.classes) or "NeMo"
    advice = f"pack it with python convert.py {directory} NAME.nemo, which {opener} opens"
    return replace(kind, what=f"{kind.what}, unpacked", classes=(), advice=advice)


def require(kind_of_model: type[object], path: Path) -> None:
    """Raises SettingsError, naming the class that opens `path`, if `kind_of_model` does not."""
    known = {name for kind in (*_BY_TARGET.values(), CTC_RUN) for name in kind.classes}
    requested = next(base.__name__ for base in kind_of_model.__mro__ if base.__name__ in known)
    kind = identify(path)
    if kind is not None and requested not in kind.classes:
        raise SettingsError(f"{kind.sentence(path)} ({requested} does not open it)")


def find_nemo(kind_of_model: type[object], name: str | Path, *, key: str) -> Path:
    """The `.nemo` file that `name` means, for a class that opens only those.

    Raises SettingsError naming `key` if there is none, or naming the class that opens it.
    """
    location = Location()
    found = location.local(str(name))
    if found is not None:
        require(kind_of_model, found)
    file = location.find_nemo(str(name), key=key)
    if file != found:
        require(kind_of_model, file)
    return file


def require_part(path: Path, key: str, *, name: str) -> None:
    """Raises SettingsError if `path`, given as the component `key`, is a model of another kind.

    `name` is the class that opens such a component; "" for an LLM, which none opens.
    """
    kind = identify(path)
    if kind is None or not kind.classes or name in kind.classes:
        return
    if set(kind.classes) & set(SPEECH_MODELS):
        advice = "to start from its weights, name it in model.init_from_checkpoint"
    else:
        advice = f"name {'a Hugging Face LLM' if not name else f'what slm.models.{name} opens'}"
    raise SettingsError(f"{key}: {path} is {kind.what}; {advice}")


def trained_class(block: Mapping[str, object]) -> str:
    """The name in `slm.models` of the class that a `model:` block trains; SALM by default.

    Raises SettingsError for a `_target_` whose training is not supported.
    """
    kind = of_config(block) or SALM
    found = [name for name in TRAINABLE if name in kind.classes]
    if not found:
        targets = " or ".join((*SPEECH_MODELS, "EncDecCTCModelBPE"))
        named = block.get("_target_", block.get("target", kind.what))
        raise SettingsError(f"model._target_: training of {named} is not supported; use {targets}")
    return found[0]
