"""What NeMo 3.0.0 computes with the tiny duplex models, and the batches it was given."""

import atexit
import json
import shutil
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from safetensors.numpy import load_file, save_file

from speechlm2_jax.batches import DuplexBatch, DuplexExample, DuplexShape, assemble_duplex_batch
from speechlm2_jax.models import DuplexS2SModel, DuplexS2SSpeechDecoderModel
from tests.parity.salm_golden import working_in
from tests.parity.shared_weights import load_with_shared

DATA = Path(__file__).parents[1] / "data" / "duplex"
_HELD = ExitStack()
"""Folders that are removed at the end."""
atexit.register(_HELD.close)
MODELS = {
    "duplex_s2s": DuplexS2SModel,
    "duplex_s2s_speech_decoder": DuplexS2SSpeechDecoderModel,
    "duplex_s2s_speech_decoder_cfg": DuplexS2SSpeechDecoderModel,
}


@cache
def golden(run: str) -> dict[str, np.ndarray]:
    """Recorded tensors by name."""
    return load_file(DATA / run / "golden.safetensors")


@cache
def facts(run: str) -> dict:
    """The recorded facts beside them."""
    return json.loads((DATA / run / "meta.json").read_text())


@cache
def recorded_batch(name: str = "pair") -> dict[str, np.ndarray]:
    """A collated batch as NeMo's model got it; the file holds its audio in 16 bits."""
    stored = load_file(DATA / f"batch_{name}.safetensors")
    audio = {name: v.astype(np.float32) / 32768 for name, v in stored.items() if v.dtype == "int16"}
    return stored | audio


def examples(name: str = "pair") -> list[DuplexExample]:
    """The conversations of a recorded batch, without its padding."""
    b = recorded_batch(name)
    return [
        DuplexExample(
            id=str(i),
            source_audio=b["source_audio"][i, : b["source_audio_lens"][i]],
            target_audio=b["target_audio"][i, : b["target_audio_lens"][i]],
            target_tokens=b["target_tokens"][i, : b["target_token_lens"][i]].astype(np.int32),
            source_tokens=b["source_tokens"][i, : b["source_token_lens"][i]].astype(np.int32),
        )
        for i in range(len(b["source_audio"]))
    ]


def batch_of(
    model, conversations: list[DuplexExample], groups: int = 1, more: float = 1.0
) -> DuplexBatch:
    """Deals conversations to groups; `more` makes every static size that much larger."""
    dealt = [conversations[g::groups] for g in range(groups)]

    def longest(name: str) -> int:
        return round(more * max(len(getattr(c, name)) for c in conversations))

    shape = DuplexShape(
        sequences=round(more * max(map(len, dealt))),
        tokens=longest("target_tokens"),
        source_samples=longest("source_audio"),
        target_samples=longest("target_audio"),
    )
    return assemble_duplex_batch(dealt, shape, pad_id=model.text_pad_id)


def configured(run: str, **changes) -> DuplexS2SModel:
    """A model built as `train.py` builds it, from the pretrained parts that NeMo had."""
    cfg = json.loads((DATA / run / "cfg_input.json").read_text())
    return MODELS[run]({**cfg, **changes}, near=(DATA,))


@cache
def hf(run: str) -> Path:
    """The directory that NeMo's to_hf.py wrote; weights that `duplex_s2s` has too lie there."""
    folder, shared = DATA / run / "hf", DATA / "duplex_s2s" / "hf" / "model.safetensors"
    if run == "duplex_s2s":
        return folder
    whole = Path(_HELD.enter_context(TemporaryDirectory())) / "hf"
    whole.mkdir()
    shutil.copy(folder / "config.json", whole)
    weights = load_with_shared(folder / "own.safetensors", shared)
    save_file(weights, whole / "model.safetensors", metadata={"format": "pt"})
    return whole


def pretrained(run: str, **changes):
    """The recorded model; `changes` are keys of its `model:` block."""
    with working_in(DATA):
        model = MODELS[run].from_pretrained(hf(run))
    if not changes:
        return model
    return MODELS[run](
        {**model.cfg, "pretrained_weights": False, **changes},
        near=(DATA,),
        variables=model.variables,
    )
