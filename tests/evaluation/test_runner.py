"""The evaluation loop: order, batches, end tokens, bad audio, speed."""

import itertools
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from speechlm2_jax.data.audio import AudioError
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.inputs import Utterance
from speechlm2_jax.evaluation.results import Speed, write_rows
from speechlm2_jax.evaluation.run import evaluate, make_prompt
from speechlm2_jax.evaluation.score_table import table
from speechlm2_jax.inference.continuous_batching import FinishedPrompt
from speechlm2_jax.inference.generate import Generated
from speechlm2_jax.settings import SettingsError
from tests.evaluation.fake_model import PAD, FakeModel

NUMBERS = ["zero", "one", "two", "three", "four", "five"]


def _config(**changes):
    return EvalConfig(**{"pretrained_name": "m", "inputs": "i", "batch_size": 2, **changes})


def _utterance(name, seconds, text="", error=None):
    def read(rate_hz):
        if error is not None:
            raise AudioError(f"{name}: {error}", cause=error)
        return np.zeros(int(seconds * rate_hz), np.float32)

    return Utterance(id=name, duration_s=float(seconds), text=text, read=read)


def test_responses_come_back_in_input_order():
    seconds = [1, 5, 2, 4, 3]
    utterances = [_utterance(f"u{s}", s, NUMBERS[s]) for s in seconds]
    model = FakeModel()
    result = evaluate(model, utterances, _config(extra_eos_tokens=("<extra>",)))
    assert [a.id for a in result.responses] == [f"u{s}" for s in seconds]
    assert [a.pred_text for a in result.responses] == [NUMBERS[s] for s in seconds]
    assert result.word_errors().wer == 0
    longest_first = [call["audio_lens"].tolist() for call in model.calls]
    assert longest_first == [[80_000, 64_000], [48_000, 32_000], [16_000, 16_000]]


def test_many_lengths_make_few_static_shapes():
    from speechlm2_jax.inference.padding import SAMPLE_UNIT, round_up

    seconds = np.random.default_rng(0).uniform(0.3, 30, 400)
    model = FakeModel()
    evaluate(
        model,
        [_utterance(f"u{n}", s) for n, s in enumerate(seconds)],
        _config(batch_size=8, verbose=False),
    )
    shapes = {(len(c["audios"]), round_up(c["audios"].shape[1], SAMPLE_UNIT)) for c in model.calls}
    assert len(model.calls) == 50
    assert len(shapes) <= 10, "two per doubling of the length, and one number of rows"


def test_a_response_ends_at_the_first_end_token():
    (response,) = evaluate(FakeModel(), [_utterance("u", 1)], _config()).responses
    assert response.pred_text == "one <extra>", "ended by </s>"
    config = _config(extra_eos_tokens=("<extra>",))
    (response,) = evaluate(FakeModel(), [_utterance("u", 1)], config).responses
    assert response.pred_text == "one"


def test_generation_is_asked_for_as_configured():
    model = FakeModel()
    config = _config(max_new_tokens=7, extra_eos_tokens=("<extra>",))
    evaluate(model, [_utterance("u", 1)], config)
    (call,) = model.calls
    given = call["generation_config"]
    assert (given.max_new_tokens, given.eos_token_id, given.pad_token_id) == (7, [1, 2], PAD)
    assert call["audios"].shape == (1, 16_000)


def test_keys_of_a_generation_config_are_handed_on_and_checked():
    model = FakeModel()
    evaluate(model, [_utterance("u", 1)], _config(generation={"num_beams": 4}))
    assert model.calls[0]["num_beams"] == 4
    for wrong, message in [
        ({"num_beans": 4}, "generation: generate does not know 'num_beans'; did you mean num_b"),
        ({"max_new_tokens": 4}, "generation.max_new_tokens: set max_new_tokens instead"),
        ({"eos_token_id": 4}, "generation.eos_token_id: set extra_eos_tokens instead"),
        ({"num_return_sequences": 2}, "generation.num_return_sequences: an evaluation takes one"),
    ]:
        with pytest.raises(ValueError, match=message):
            _config(generation=wrong)


class DraftingModel(FakeModel):
    """Checks 10 draft tokens for each recording, and accepts as many as it has seconds."""

    def generate(self, prompts: Any, **options: Any) -> Any:
        accepted = np.asarray(options["audio_lens"]) // 16_000
        ids = super().generate(prompts, **options)
        return Generated(np.asarray(ids, np.int32), None, np.full(len(ids), 10), accepted)


def test_drafts_of_an_asr_model_are_counted_without_the_copies_that_fill_a_batch():
    model, asr = DraftingModel(), object()
    utterances = [_utterance(f"u{n}", n) for n in (3, 2, 1)]
    config = _config(batch_size=2, draft="asr.nemo")
    result = evaluate(model, utterances, config, draft_model=asr)
    assert [response.pred_text for response in result.responses] == [
        f"{word} <extra>" for word in ("three", "two", "one")
    ]
    assert all(call["assistant_model"] is asr for call in model.calls)
    totals = result.totals()
    assert (totals["draft_tokens"], totals["accepted_draft_tokens"]) == (30, 6)
    assert "draft tokens accepted  20.00% of 30" in table(totals)
    plain = evaluate(FakeModel(), utterances, _config())
    assert "draft" not in table(plain.totals())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(generation={"num_beams": 2}), "draft: beam search has no drafts"),
        (dict(generation={"prompt_lookup_num_tokens": 2}), "draft: .* a source of drafts too"),
        (dict(generation={"drafts": ["a"]}), "generation.drafts: set draft instead"),
    ],
)
def test_one_source_of_drafts_and_no_beams(wrong, message):
    with pytest.raises(SettingsError, match=message):
        _config(draft="encoder", **wrong)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, [("user", "<|audio|>")]),
        ({"user_prompt": "Transcribe:"}, [("user", "Transcribe: <|audio|>")]),
        ({"user_prompt": "<|audio|> what?"}, [("user", "<|audio|> what?")]),
        ({"system_prompt": "Be brief."}, [("system", "Be brief."), ("user", "<|audio|>")]),
    ],
)
def test_the_prompt_is_nemos(arguments, expected):
    prompt = make_prompt(FakeModel(), _config(**arguments))
    assert [(turn["role"], turn["content"]) for turn in prompt] == expected


def test_an_extra_end_token_that_is_not_there_is_refused():
    with pytest.raises(SettingsError, match="extra_eos_tokens needs the token '<end>'"):
        evaluate(FakeModel(), [_utterance("u", 1)], _config(extra_eos_tokens=("<end>",)))


def test_bad_audio_is_skipped_counted_and_reported():
    lines: list[str] = []
    utterances = [
        _utterance("good", 1, "one"),
        _utterance("bad", 2, "two", error="truncated"),
        _utterance("worse", 0, "zero", error="missing"),
    ]
    result = evaluate(
        FakeModel(), utterances, _config(batch_size=1, extra_eos_tokens=("<extra>",)), lines.append
    )
    rows = result.rows()
    assert [row["id"] for row in rows] == ["good", "bad", "worse"]
    assert rows[1]["error"] == "bad: truncated"
    assert rows[1]["pred_text"] == ""
    totals = result.totals()
    assert totals["failed"] == {"missing": 1, "truncated": 1}
    assert (totals["scored"], totals["wer"]) == (1, 0.0)
    assert "skipped bad: bad: truncated" in lines
    assert "failed: 1 missing, 1 truncated" in table(totals)


def test_every_row_failing_still_gives_a_report():
    result = evaluate(FakeModel(), [_utterance("bad", 1, "a", error="empty")], _config())
    assert result.totals()["rtfx"] is None
    assert "n/a" in table(result.totals())


def test_without_references_transcripts_are_printed_and_nothing_is_scored():
    lines: list[str] = []
    utterance = _utterance("u.wav", 1, None)
    result = evaluate(FakeModel(), [utterance], _config(verbose=False), lines.append)
    assert lines == ["u.wav: one <extra>"]
    assert result.rows()[0]["text"] is None
    assert "WER" not in table(result.totals())


def test_verbose_prints_reference_hypothesis_and_batch_errors():
    lines: list[str] = []
    evaluate(FakeModel(), [_utterance("u", 1, "Two!")], _config(), lines.append)
    assert lines[0] == "u\n  reference:  Two!\n  hypothesis: one <extra>"
    assert lines[1].startswith("batch of 1: WER 100.00% (insertions 0, deletions 0, subst")


def test_texts_are_normalised_for_scoring_and_kept_raw_beside():
    config = _config(extra_eos_tokens=("<extra>",))
    result = evaluate(FakeModel(), [_utterance("u", 1, "Colour!")], config)
    assert result.rows() == [
        {
            "id": "u",
            "duration": 1.0,
            "text": "color",
            "pred_text": "one",
            "text_raw": "Colour!",
            "pred_text_raw": "one",
        }
    ]


def test_warm_up_is_the_batches_that_compiled_something():
    utterances = [_utterance(f"u{i}", 5 - i) for i in range(5)]
    model = FakeModel()
    from tests.evaluation import fake_model

    fake_model._generated.clear_cache()
    speed = evaluate(model, utterances, _config(verbose=False)).speed
    assert speed.audio_s == pytest.approx(15)
    assert speed.warm_audio_s == pytest.approx(15 - 9), "only the first batch compiled"
    assert speed.warm_generate_s < speed.generate_s
    assert speed.rtfx_warm > speed.rtfx


def test_speed_is_a_ratio_of_sums():
    speed = Speed().add(10.0, 5.0, compiled=True).add(30.0, 1.0, compiled=False)
    assert speed.rtfx == pytest.approx(40 / 6)
    assert speed.rtfx_warm == pytest.approx(30)
    assert Speed().rtfx is None


def test_rows_are_followed_by_where_they_come_from(tmp_path):
    path = tmp_path / "deep" / "out.jsonl"
    write_rows(path, [{"id": "é"}, {"id": "b"}], {"dtype": "float32"})
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines == [{"id": "é"}, {"id": "b"}, {"provenance": {"dtype": "float32"}}]
    assert [p.name for p in path.parent.iterdir()] == ["out.jsonl"]


def test_a_long_recording_is_split_into_chunks_which_is_logged():
    from speechlm2_jax.inference.long_form.chunks import cut

    lines: list[str] = []
    utterances = [_utterance("short", 2), _utterance("long.wav", 7)]
    model = FakeModel()
    config = _config(max_audio_s=3.0, extra_eos_tokens=("<extra>",))
    short, long = evaluate(model, utterances, config, lines.append).responses
    chunks = cut(np.zeros(7 * 16_000, np.float32), rate_hz=16_000, max_s=3.0)
    lengths = [n for call in model.calls for n in call["audio_lens"].tolist()]
    assert lengths[: len(chunks) + 1] == [*(c.end - c.start for c in chunks), 32_000]
    assert lines[0] == (
        f"long.wav: 7.0 s are more than max_audio_s=3; split into {len(chunks)} overlapping chunks"
    )
    texts = [NUMBERS[(c.end - c.start) // 16_000] for c in chunks]
    assert long.pred_text == " ".join(texts) and long.duration_s == 7
    assert short.pred_text == "two"
    (whole,) = evaluate(FakeModel(), utterances[1:], _config(max_audio_s=None)).responses
    assert whole.pred_text == "five <extra>", "null: at once"
    with pytest.raises(ValueError, match="max_audio_s=0.5 must be at least 1, or null"):
        _config(max_audio_s=0.5)


class StreamingFake(FakeModel):
    """Continuous batching on two slots, the later of two prompts first."""

    def generate_each(self, prompts, **options):
        assert options["slots"] == 2
        numbered = enumerate(prompts)
        while pair := list(itertools.islice(numbered, 2)):
            audio = [prompt[-1]["audio"][0] for _, prompt in pair]
            lengths = np.array([len(wave) for wave in audio])
            ids = self.generate([p for _, p in pair], audio_lens=lengths, **options)
            for (number, _), row in list(zip(pair, ids, strict=True))[::-1]:
                yield [(number, row)]


def test_continuous_batching_counts_drafts_too():
    class Drafting(StreamingFake):
        def generate_each(self, prompts, **options):
            assert options["assistant_model"] is asr
            for ((number, ids),) in super().generate_each(prompts, **options):
                finished = FinishedPrompt(number, ids)
                finished.drafted, finished.accepted = 10, number
                yield [finished]

    model, asr = Drafting(), object()
    utterances = [_utterance(f"u{n}", n) for n in (3, 2, 1)]
    result = evaluate(model, utterances, _config(batch_size=2, draft="asr.nemo"), draft_model=asr)
    assert (result.speed.drafted, result.speed.accepted) == (30, 0 + 1 + 2)
    assert all("audios" not in call for call in model.calls), "not in batches"


def test_responses_that_come_as_they_end_are_put_in_order_and_timed():
    seconds = [1, 5, 2, 4, 3]
    utterances = [_utterance(f"u{s}", s, NUMBERS[s]) for s in seconds]
    utterances.insert(2, _utterance("bad", 9, "x", error="missing"))
    config = _config(extra_eos_tokens=("<extra>",), verbose=False)
    result = evaluate(model := StreamingFake(), utterances, config)
    assert [a.pred_text for a in result.responses] == ["one", "five", "", "two", "four", "three"]
    assert all("audios" not in call for call in model.calls), "not in batches"
    assert result.speed.audio_s == 15 and result.speed.generate_s > 0
    batches = evaluate(
        model := StreamingFake(), utterances, replace(config, continuous_batching=False)
    )
    assert [a.pred_text for a in batches.responses] == [a.pred_text for a in result.responses]
    assert all("audios" in call for call in model.calls)
    evaluate(model := StreamingFake(), utterances, replace(config, generation={"num_beams": 2}))
    assert all("audios" in call for call in model.calls), "beams go batch by batch"
