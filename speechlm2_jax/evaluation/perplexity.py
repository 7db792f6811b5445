"""How likely a model finds the references: the losses of which perplexity is made."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Float

from speechlm2_jax import processes
from speechlm2_jax.batches import SalmExample
from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.data.prompts import OUTPUT_ROLE, PromptFormatter
from speechlm2_jax.data.prompts.prompt import Turn
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.read_audio import longest_first, read_batches, recordings_of
from speechlm2_jax.inference.engine import Engine
from speechlm2_jax.inference.log_likelihood import ResponseLoss, response_losses


class ModelWithEngine(Protocol):
    """A model whose forward pass is known; `speechlm2_jax.models.SALM` is one."""

    sampling_rate: int
    audio_locator_tag: str
    prompt_formatter: PromptFormatter

    def engine(self) -> Engine:
        """Network and weights."""
        ...


def losses_of_references(
    model: ModelWithEngine,
    utterances: Sequence[Utterance],
    prompt: Sequence[Turn],
    batch_size: int,
    max_s: float | None,
    *,
    is_joint: bool,
) -> list[ResponseLoss | None]:
    """The loss of each reference given its recording and prompt, in input order.

    `prompt` is that of recordings; conversations have their own, and all their responses count.
    None without a reference, for recordings that cannot be read, and for those longer than `max_s`
    seconds: a reference of chunks is not known. Each of several processes, which all must call it,
    computes every n-th one; with `is_joint` all compute each together.
    """
    known = [i for i, utterance in enumerate(utterances) if utterance.text is not None]
    order = [known[i] for i in longest_first([utterances[i].duration_s for i in known])]
    own = order if is_joint else order[jax.process_index() :: jax.process_count()]
    found: list[ResponseLoss | None] = [None] * len(utterances)
    read = partial(_read, rate_hz=model.sampling_rate, max_s=max_s)
    mine: dict[int, ResponseLoss] = {}
    batches = read_batches(utterances, own, read, batch_size, what="perplexity:")
    for number, batch in enumerate(batches):
        examples = {i: _example(model, utterances[i], w, prompt) for i, w in batch.items()}
        mine |= _losses(model.engine(), examples, batch_size if number else 0)
    for part in processes.gather_texts(json.dumps([(i, asdict(v)) for i, v in mine.items()])):
        for index, values in json.loads(part):
            found[index] = ResponseLoss(**values)
    return found


def _losses(
    engine: Engine, examples: dict[int, SalmExample], at_least: int
) -> dict[int, ResponseLoss]:
    """The losses by index. Batches are filled up, so that no new shape is compiled."""
    if not examples:
        return {}
    batch = list(examples.values())
    filled = batch + batch[-1:] * (at_least - len(batch))
    return dict(zip(examples, response_losses(engine, filled), strict=False))


def _example(
    model: ModelWithEngine,
    utterance: Utterance,
    recordings: tuple[Float[np.ndarray, " _"], ...],
    prompt: Sequence[Turn],
) -> SalmExample:
    """Prompt and reference as an example of training."""
    formatter, text = model.prompt_formatter, utterance.text or ""
    if utterance.dialog is None:
        turns = [*prompt, {"role": OUTPUT_ROLE, "content": text}]
    else:
        messages = utterance.dialog.messages(model.audio_locator_tag)
        turns = formatter.dialog([*messages, (OUTPUT_ROLE, text)])
    encoded = formatter.encode_dialog(turns)
    assert encoded.mask is not None, "the last turn is the model's"
    ids = np.asarray(encoded.input_ids, np.int32)
    return SalmExample(id=utterance.id, tokens=ids, loss_mask=encoded.mask, audio=recordings)


def _read(
    utterance: Utterance, rate_hz: int, max_s: float | None
) -> tuple[Float[np.ndarray, " _"], ...] | None:
    """The recordings; None if they cannot be read, which generation has told, or are too long."""
    try:
        found = recordings_of(utterance, rate_hz)
    except AudioError:
        return None
    is_long = max_s is not None and utterance.dialog is None and len(found[0]) > max_s * rate_hz
    return None if is_long else found
