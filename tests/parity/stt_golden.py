"""What NeMo 3.0.0 computes with a tiny DuplexSTTModel, and the model itself.

Its weights are those of `duplex_s2s`; those of the user's channel are its embedding and head,
rolled along the vocabulary.
"""

import json
from dataclasses import replace
from functools import cache

import numpy as np
from safetensors.numpy import load_file

from speechlm2_jax.batches import DuplexShape, DuplexSttBatch, assemble_duplex_stt_batch
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.readers import memory_source
from speechlm2_jax.models import DuplexSTTModel
from tests.parity.duplex_golden import DATA, examples, recorded_batch

FOLDER = DATA / "duplex_stt"
FACTS = json.loads((FOLDER / "golden.json").read_text())
GOLDEN = load_file(FOLDER / "golden.safetensors")
NOT_OF_STT = ("pretrained_audio_codec", "scoring_asr", "audio_loss_weight")


def settings(**changes) -> dict:
    """The `model:` block that NeMo had."""
    cfg = json.loads((DATA / "duplex_s2s" / "cfg_input.json").read_text())
    own = {key: value for key, value in cfg.items() if key not in NOT_OF_STT}
    own |= {"source_sample_rate": 16000, "validation_save_path": "results"}
    return {**own, "freeze_params": [], "text_loss_weight": 1.0, **changes}


@cache
def stored(has_user_text: bool) -> dict[str, np.ndarray]:
    """The recorded weights under NeMo's names."""
    kept = ("llm.", "perception.", "embed_tokens", "lm_head")
    every = load_file(DATA / "duplex_s2s" / "hf" / "model.safetensors")
    weights = {name: value for name, value in every.items() if name.startswith(kept)}
    if has_user_text:
        head, embedding = FACTS["rolls"]
        weights["asr_head.weight"] = np.roll(weights["lm_head.weight"], head, 0)
        weights["embed_asr_tokens.weight"] = np.roll(weights["embed_tokens.weight"], embedding, 0)
    return weights


def model_with(**changes) -> DuplexSTTModel:
    """The recorded model; `changes` are keys of its `model:` block."""
    model = DuplexSTTModel(settings(**changes), near=(DATA,))
    source = memory_source(stored(model.predict_user_text))
    model.variables = mapping.load(source, model._blueprint.table, model.infos)
    return model


def batch_of(case: dict, more: int = 0, groups: int = 1) -> DuplexSttBatch:
    """The batch of a recorded case; `more` makes every static size that much larger."""
    name = case["batch"].removeprefix("batch_")
    prompts = case["prompts"] or [[]] * len(recorded_batch(name)["source_audio"])
    conversations = [
        replace(
            example,
            target_audio=np.zeros(0, np.float32),
            prompt_tokens=np.array(prompt, np.int32),
            is_asr=case["task"] == "asr",
        )
        for example, prompt in zip(examples(name), prompts, strict=True)
    ]
    dealt = [conversations[g::groups] for g in range(groups)]
    shape = DuplexShape(
        sequences=max(map(len, dealt)) + min(more, 1),
        tokens=max(len(c.target_tokens) for c in conversations) + more,
        source_samples=max(len(c.source_audio) for c in conversations) + 1280 * more,
        target_samples=0,
        prompt_tokens=max(map(len, prompts)) + more,
    )
    return assemble_duplex_stt_batch(dealt, shape, pad_id=0)
