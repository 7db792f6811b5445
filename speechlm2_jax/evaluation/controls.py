"""Controls: the same prompts with audio that tells nothing about the reference.

A model that uses the audio fails on them. What it still gets right, it guesses from the prompt and
from what texts of this kind are like.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from speechlm2_jax import processes
from speechlm2_jax.evaluation.comparisons import SILENT, SWAPPED
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.devices import show
from speechlm2_jax.evaluation.generate import EvaluatedModel
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.metrics.wer import text_normalizer
from speechlm2_jax.evaluation.read_audio import longest_first
from speechlm2_jax.evaluation.run import evaluate
from speechlm2_jax.evaluation.swap_audio import is_swappable, swap_audio
from speechlm2_jax.settings import SettingsError


def control_inputs(
    utterances: Sequence[Utterance], normalizer: str | bool | None
) -> dict[str, dict[int, Utterance]]:
    """The inputs of each control by index of the utterance; only those with a reference.

    Conversations with several recordings or none have no swapped audio. A control that is not
    possible is left out, with a note.
    """
    known = {i: u for i, u in enumerate(utterances) if u.text is not None}
    if not known:
        return {}
    found = {}
    alone = {i: u for i, u in known.items() if is_swappable(u)}
    try:
        swapped = swap_audio(list(alone.values()), text_normalizer(normalizer))
        found[SWAPPED] = dict(zip(alone, swapped, strict=True))
    except SettingsError as error:
        show(f"note   controls: no swapped audio, as it {str(error).removeprefix('swap_audio: ')}")
    found[SILENT] = {i: _silent(u) for i, u in known.items()}
    return found


def _silent(utterance: Utterance) -> Utterance:
    """An utterance with digital silence of the same length as its recordings."""
    if utterance.dialog is None:
        read = utterance.read
        return replace(utterance, read=lambda rate_hz: np.zeros_like(read(rate_hz)))
    dialog = utterance.dialog
    return replace(
        utterance,
        dialog=replace(dialog, process=lambda wave, _rate_hz, _number: np.zeros_like(wave)),
    )


def control_texts(
    model: EvaluatedModel,
    inputs: Mapping[int, Utterance],
    config: EvalConfig,
    *,
    is_joint: bool,
    draft_model: Any = None,
) -> dict[int, str]:
    """The response to each input of a control, without those that cannot be read.

    Each of several processes, which all must call it, generates every n-th response; with
    `is_joint` all generate each together.
    """
    indices = list(inputs)
    order = [indices[i] for i in longest_first([inputs[i].duration_s for i in indices])]
    own = order if is_joint else order[jax.process_index() :: jax.process_count()]
    result = evaluate(
        model,
        [inputs[i] for i in own],
        replace(config, verbose=False),
        lambda _: None,  # what is skipped or split was told of the recordings themselves
        is_joint=is_joint,
        draft_model=draft_model,
    )
    responses = zip(own, result.responses, strict=True)
    mine = [(i, response.pred_text) for i, response in responses if response.error is None]
    return {
        index: text
        for part in processes.gather_texts(json.dumps(mine))
        for index, text in json.loads(part)
    }
