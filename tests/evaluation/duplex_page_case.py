"""A small evaluation of a duplex model with everything that its page can show, without a model."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.evaluation.duplex.inputs import Dialogue
from speechlm2_jax.evaluation.duplex.results import DialogueResult, DuplexEvaluation
from speechlm2_jax.evaluation.duplex.turns import SpokenWord, TranscribedTurn
from speechlm2_jax.evaluation.html_report.duplex_page import write_duplex_page
from speechlm2_jax.evaluation.metrics.token_accuracy import TokenCounts
from speechlm2_jax.evaluation.metrics.turn_taking import Turns, turn_marks
from speechlm2_jax.evaluation.results import Speed
from tests.evaluation.page_case import HOSTILE, RECORD, tone, utterance

USER_HZ, AGENT_HZ = 16_000, 22_050
TOKENIZER = Path(__file__).parents[1] / "data" / "duplex" / "assets" / "llm"
DELAY_S = 0.08
"""Between words."""


def turn(start_s: float, end_s: float, text: str, *, is_marked: bool = True) -> TranscribedTurn:
    """A turn whose words follow each other quickly, as a text channel has them."""
    words = [
        SpokenWord(start_s=start_s + DELAY_S * (n + 1), text=w) for n, w in enumerate(text.split())
    ]
    return TranscribedTurn(start_s=start_s, end_s=end_s, words=tuple(words), is_marked=is_marked)


def result(
    name: str,
    duration_s: float,
    user: list[TranscribedTurn],
    should: list[TranscribedTurn],
    agent: list[TranscribedTurn],
    **fields: Any,
) -> DialogueResult:
    """A conversation with the marks that its turns make."""
    sides = [
        Turns.from_segments([(t.start_s, t.end_s) for t in turns if t.is_marked])
        for turns in (user, agent)
    ]
    texts = [" ".join(t.text for t in turns) for turns in (user, should, agent)]
    values: dict[str, Any] = {
        "set_name": "office",
        "user_text": texts[0],
        "text": texts[1],
        "pred_text": texts[2],
        "counts": TokenCounts(text=12, text_right=9, codes=80, codes_right=40, codes_silent=5),
        "rtf": 0.031,
        "marks": tuple(turn_marks(*sides)),
        "user_turns": tuple(user),
        "reference_turns": tuple(should),
        "agent_turns": tuple(agent),
    }
    return DialogueResult(id=name, duration_s=duration_s, **{**values, **fields})


def small_results() -> list[DialogueResult]:
    """Right, delayed, unanswered and interrupted; hostile, unreadable and without a reference."""
    question = turn(0.3, 2.4, "can you close the window in my room")
    reply = turn(2.8, 4.6, "yes the window is closed now")
    return [
        result("right", 5.2, [question], [reply], [reply], asr_text="yes the window is close now"),
        result(
            "interrupted",
            11.4,
            [question, turn(4.1, 6.0, "no wait the door"), turn(8.2, 9.0, "thanks")],
            [reply, turn(6.4, 8.0, "the door is closed")],
            [turn(2.72, 5.0, "yes the window is"), turn(6.9, 8.1, "the door is close")],
            asr_text="yes the window is the door is closed",
            set_name="kitchen",
        ),
        result(
            "continues",
            6.4,
            [question, turn(3.4, 4.4, "stop")],
            [reply],
            [
                turn(
                    2.0,
                    6.2,
                    "window window and a long one unbelievablylongword after it",
                )
            ],
            set_name="kitchen",
        ),
        result(
            "hostile",
            5.0,
            [turn(0.2, 2.0, "what is it")],
            [turn(2.4, 4.0, "nothing")],
            [turn(2.6, 4.2, f"nothing {HOSTILE}"), turn(4.4, 4.6, "uh", is_marked=False)],
        ),
        result("silent", 4.0, [question], [turn(2.8, 3.8, "yes")], [], asr_text=""),
        result("unscored", 3.0, [], [], [turn(1.0, 2.0, "who knows")], text=None, user_text=None),
        result("broken", 2.0, [], [], [], error="broken.wav: truncated", cause="truncated"),
    ]


def write_small_duplex_page(
    folder: Path, results: list[DialogueResult] | None = None, media_rows: int = 100
) -> Path:
    """Writes the page of `small_results`, and the agent's speech beside it."""
    results = small_results() if results is None else results
    saved, dialogues = [], []
    for one in results:
        file = folder / f"{one.id}.wav"
        if one.audio is None and one.error is None:
            soundfile.write(file, speech(one.agent_turns, one.duration_s, AGENT_HZ), AGENT_HZ)
            one = DialogueResult(**{**vars(one), "audio": str(file)})
        saved.append(one)
        dialogues.append(Dialogue(set_name=one.set_name, source=user_recording(one)))
    scores = {
        "txt_bleu": 41.2,
        "asr_bleu": 30.5,
        "wer": 0.31,
        "cer": 0.18,
        "empty_text_rate": 1 / 6,
        "txt_token_acc": 0.75,
        "audio_token_acc": 0.5,
        "audio_token_acc_of_silence": 0.0625,
        "turn_taking_precision": 0.8,
        "turn_taking_recall": 0.71,
        "turn_taking_f1": 0.75,
        "turn_taking_latency_mean_s": 0.46,
        "turn_taking_latency_median_s": 0.42,
        "barge_in_success": 0.5,
    }
    named = {f"{key}_{name}": v for key, v in scores.items() for name in ("office", "kitchen")}
    evaluation = DuplexEvaluation(
        results=tuple(saved),
        scores={**scores, **named},
        speed=Speed(audio_s=36.2, generate_s=2.0, warm_audio_s=30.0, warm_generate_s=1.0),
    )
    dataset = DuplexS2SDataset(Tokenizer(TOKENIZER), 0.08, USER_HZ, AGENT_HZ)
    path = folder / "report.html"
    write_duplex_page(
        *(path, evaluation, dialogues, dataset, RECORD), media_rows=media_rows, normalizer="none"
    )
    return path


def user_recording(one: DialogueResult) -> Any:
    """The user's recording: a tone in the user's turns."""
    made = utterance(one.id, one.duration_s)
    wave = speech(one.user_turns, one.duration_s, USER_HZ)
    return type(made)(**{**vars(made), "read": lambda rate_hz: wave})


def speech(turns: tuple[TranscribedTurn, ...], duration_s: float, rate_hz: int) -> np.ndarray:
    """A tone in every turn, silence between."""
    wave = np.zeros(round(duration_s * rate_hz), np.float32)
    for t in turns:
        start = round(t.start_s * rate_hz)
        made = tone(t.end_s - t.start_s, rate_hz)[: len(wave) - start]
        wave[start : start + len(made)] = made
    return wave
