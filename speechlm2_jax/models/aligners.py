"""Which ASR model finds the times of a model's words: its encoder's own CTC head, or another."""

import logging
from pathlib import Path

from speechlm2_jax.conversion.readers import read_nemo
from speechlm2_jax.inference.timestamps import DEFAULT_ALIGNER
from speechlm2_jax.inference.timestamps.aligner import Aligner
from speechlm2_jax.models.asr import ASRModel
from speechlm2_jax.models.ctc import CTCModel
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.asr import DECODERS
from speechlm2_jax.pretrained.asr_labels import class_name
from speechlm2_jax.pretrained.locate import Location, config_folders
from speechlm2_jax.pretrained.save_load import open_model
from speechlm2_jax.settings import SettingsError

KEY = "aligner"
_WITH_ENCODER = ("SALM", "SALMWithAsrDecoder")
"""Classes whose encoder is that of an ASR model."""
log = logging.getLogger(__name__)


def open_aligner(name: str | Path, *, key: str = KEY) -> Aligner:
    """Opens an ASR model as an aligner: a `.nemo` file, a run of a CTC model, or a hub name.

    A hybrid model aligns with its CTC head, and a SALM, a run or a directory, with that of its
    encoder's ASR model. Raises SettingsError naming `key` for another model, or if there is none.
    """
    found = Location().local(str(name))
    if found is None or found.suffix == ".nemo":
        found = Location().find_nemo(str(name), key=key)
    kind = registry.identify(found)
    if kind is not None and kind.classes == ("CTCModel",):
        return CTCModel.from_pretrained(found).aligner()
    if kind is not None and set(kind.classes) & set(_WITH_ENCODER):
        return _aligner_of_encoder(found, kind, key)
    if kind is None or "ASRModel" not in kind.classes:
        what = kind.sentence(found) if kind else f"{found} is not a known kind of model"
        raise SettingsError(f"{key}: {what}; name an ASR model, such as {DEFAULT_ALIGNER}")
    file = registry.find_nemo(ASRModel, found, key=key)
    return ASRModel.from_pretrained(file, decoder="ctc" if _has_ctc_head(file) else None).aligner()


def usual_aligner(asr_name: object, near: tuple[Path, ...] = ()) -> Aligner | None:
    """The aligner of a model with an LLM, if none is named.

    `asr_name` is the ASR model that its encoder came from (`model.pretrained_asr`): its CTC head is
    taken if its file is on this machine, found here or in one of the folders `near`. Without one it
    is DEFAULT_ALIGNER, which is fetched once; one line tells so. If it cannot be had, a warning
    tells why and the result is None.
    """
    if (file := _file_with_head(asr_name, near)) is not None:
        return open_aligner(file)
    log.info("word times: the model has no CTC head; the aligner is %s", DEFAULT_ALIGNER)
    try:
        return open_aligner(DEFAULT_ALIGNER)
    except SettingsError as error:
        log.warning("no word times: %s; name an ASR model of this machine as the aligner", error)
        return None


def _aligner_of_encoder(path: Path, kind: registry.Kind, key: str) -> Aligner:
    """The CTC head that the encoder of a SALM came with; the SALM itself is not loaded."""
    source = open_model(str(path))
    asr_name = source.named.get("pretrained_asr")
    if (file := _file_with_head(asr_name, source.near)) is None:
        raise SettingsError(
            f"{key}: {path} is {kind.what}, and its encoder's ASR model ({asr_name}) is not on "
            f"this machine or has no CTC head; name an ASR model, such as {DEFAULT_ALIGNER}"
        )
    return open_aligner(file, key=key)


def _file_with_head(asr_name: object, near: tuple[Path, ...]) -> Path | None:
    """The `.nemo` file of the ASR model `asr_name`, if it is here and has a CTC head."""
    location = Location(near=(*near, *config_folders()))
    file = location.local(asr_name) if isinstance(asr_name, str) else None
    return file if file and file.suffix == ".nemo" and _has_ctc_head(file) else None


def _has_ctc_head(file: Path) -> bool:
    """Whether a `.nemo` file is a CTC or hybrid model."""
    return "ctc" in DECODERS.get(class_name(read_nemo(file)), ())
