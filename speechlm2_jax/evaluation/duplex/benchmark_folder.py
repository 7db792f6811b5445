"""Writes conversations as Full-Duplex-Bench has them, for its own tools to score.

A folder for each set, in it one for each conversation: 1, 2, ... with

- `input.wav` and `output.wav`: user and agent, 16 kHz, equally long and on one time axis;
- `metadata.json`: `id`, the first question and the last one, and the times of the event;
- `turn_taking.json`, `pause.json`, `interrupt.json`: times of such events, if there are any.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from speechlm2_jax.data.audio import sinc_resample
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.evaluation.duplex.events import BACK_CHANNEL, INTERRUPTION, PAUSE
from speechlm2_jax.evaluation.duplex.inputs import Dialogue

RATE_HZ = 16_000
OUTPUT = "output.wav"


def write_benchmark(
    folder: Path,
    dialogue: Dialogue,
    user: Float[np.ndarray, " S"],
    agent: Float[np.ndarray, " A"],
    *,
    rates_hz: tuple[int, int],
    delay_s: float,
    roles: tuple[str, ...],
) -> None:
    """Writes one conversation.

    Args:
        folder: of the conversation.
        dialogue: the input.
        user: its samples.
        agent: the generated samples.
        rates_hz: of both.
        delay_s: by which the agent comes later than its samples: a frame is generated when it has
            been encoded.
        roles: speakers that are the user.
    """
    import soundfile

    folder.mkdir(parents=True, exist_ok=True)
    source = sinc_resample(user, rates_hz[0], RATE_HZ)
    made = sinc_resample(agent, rates_hz[1], RATE_HZ)
    target = np.pad(made, (round(delay_s * RATE_HZ), len(source)))[: len(source)]
    for name, wave in (("input.wav", source), (OUTPUT, target)):
        soundfile.write(str(folder / name), np.clip(wave, -1, 1), RATE_HZ, subtype="PCM_16")
    for name, value in _annotations(dialogue, roles).items():
        (folder / name).write_text(json.dumps(value, indent=1))


def _annotations(dialogue: Dialogue, roles: tuple[str, ...]) -> dict[str, Any]:
    """JSON files of a conversation by name."""
    found: dict[str, Any] = {"metadata.json": {"id": dialogue.id}}
    if not isinstance(dialogue.source, DuplexConversation):
        return found
    turns = dialogue.source.turns_of(frozenset(roles))
    times: dict[str, list[list[float]]] = {}
    for event in dialogue.source.events:
        times.setdefault(event.kind, []).append([event.start_s, event.end_s])
    if turns:
        overlaps = [*times.get(INTERRUPTION, ()), *times.get(BACK_CHANNEL, ())]
        found["metadata.json"] |= {
            "context_text": turns[0].text,
            "current_turn_text": turns[-1].text,
            "timestamps": overlaps[0] if overlaps else [turns[-1].start_s, turns[-1].end_s],
        }
        end_s = turns[-1].end_s
        found["turn_taking.json"] = [{"text": "[TURN-TAKING]", "timestamp": [end_s, end_s]}]
    if PAUSE in times:
        found["pause.json"] = [{"text": "[PAUSE]", "timestamp": one} for one in times[PAUSE]]
    if INTERRUPTION in times:
        found["interrupt.json"] = [
            {"context": turns[0].text, "interrupt": turns[-1].text, "timestamp": one}
            for one in times[INTERRUPTION]
        ]
    return found
