"""Speculative decoding in `generate`: the same tokens, from texts, ASR models and prompt lookup."""

from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.evaluation.encoder_wer import RemembersTexts
from speechlm2_jax.inference.drafts import token_classes
from speechlm2_jax.inference.request.values import check_values
from speechlm2_jax.models import SALM

ROOT = Path(__file__).parents[2]
PROMPTS = [[{"role": "user", "content": text}] for text in ("What time is it?", "Yes", "No. Why?")]
WHOLE = dict(max_new_tokens=12, return_dict_in_generate=True)


class Transcriber:
    """Stands for an ASR model: "transcribes" a recording to the text of its own."""

    def __init__(self, texts: dict[int, str], sampling_rate: int = 16000):
        self.texts, self.sampling_rate = texts, sampling_rate

    def transcribe(self, audio):
        return [self.texts[len(wave)] for wave in audio]


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(ROOT / "tests" / "data" / "salm" / "llama_adapter_hf").eval()


@pytest.fixture(scope="module")
def plain(model):
    return model.generate(PROMPTS, max_new_tokens=12)


def as_texts(monkeypatch, model, rows):
    """Texts that the tokenizer encodes as these ids: random ones have no text of their own."""
    ids = {f"text {n}": row.tolist() for n, row in enumerate(rows)} | {"": []}
    encode = model.tokenizer.texts_to_ids
    monkeypatch.setattr(
        model.tokenizer, "texts_to_ids", lambda texts: [ids.get(t) or encode([t])[0] for t in texts]
    )
    return list(ids)[:-1]


def test_drafts_change_the_speed_and_no_token(model, plain, monkeypatch):
    right = as_texts(monkeypatch, model, plain[:, -12:])
    found = model.generate(PROMPTS, drafts=[right[0], "", right[1]], **WHOLE)
    np.testing.assert_array_equal(found.sequences, plain)
    assert found.accepted.tolist()[:2] == found.drafted.tolist()[:2] == [10, 0]
    assert found.accepted[2] < found.drafted[2]


@pytest.mark.slow
def test_streams_samples_and_prompt_lookup_have_the_same_tokens(model, plain, monkeypatch):
    right = as_texts(monkeypatch, model, plain[:, -12:])
    pieces = list(model.stream(PROMPTS, drafts=right, max_new_tokens=12, tokens_at_once=3))
    joined = [sum((p.ids.tolist() for p in pieces if p.row == row), []) for row in range(3)]
    assert joined == plain[:, -12:].tolist()
    assert len(pieces) < 3 * (1 + 11 // 3)
    drawn = dict(do_sample=True, num_return_sequences=2, temperature=1.5, seed=5, **WHOLE)
    expected = model.generate(PROMPTS, **drawn).sequences
    for source in (dict(drafts=right), dict(prompt_lookup_num_tokens=4)):
        np.testing.assert_array_equal(
            model.generate(PROMPTS, **drawn, **source).sequences, expected
        )
    penalty = dict(repetition_penalty=1.5, no_repeat_ngram_size=2, max_new_tokens=12)
    expected = model.generate(PROMPTS, **penalty)
    found = model.generate(PROMPTS, prompt_lookup_num_tokens=4, **penalty)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("drafts_of", [lambda asr: asr, RemembersTexts], ids=["ASR", "encoder"])
def test_all_that_transcribes_may_be_an_assistant(drafts_of):
    check_values({"assistant_model": drafts_of(Transcriber({}))}, 10, ())


@pytest.mark.slow
def test_transcripts_of_recordings_are_drafts_also_of_chunks(model, monkeypatch):
    draw = np.random.default_rng(0)
    waves = [draw.normal(size=n).astype(np.float32) * 0.1 for n in (9000, 20000, 60000)]
    turn = {"role": "user", "content": f"Say: {model.audio_locator_tag}"}
    prompts = [[{**turn, "audio": [wave]}] for wave in waves]
    expected = model.generate(prompts, max_new_tokens=12, max_audio_s=False)
    texts = as_texts(monkeypatch, model, expected)
    assistant = Transcriber({len(w): t for w, t in zip(waves, texts, strict=True)})
    for source in (assistant, RemembersTexts(assistant)):
        found = model.generate(prompts, assistant_model=source, max_audio_s=False, **WHOLE)
        np.testing.assert_array_equal(found.sequences, expected)
        assert found.accepted.tolist() == found.drafted.tolist() == [10] * 3

    class AnyLength(Transcriber):
        def transcribe(self, audio):
            return [texts[0]] * len(audio)

    chunked = dict(max_new_tokens=12, max_audio_s=2.0)
    np.testing.assert_array_equal(
        model.generate(prompts, assistant_model=AnyLength({}), **chunked),
        model.generate(prompts, **chunked),
    )
    with pytest.raises(ValueError, match="drafts: not supported with a recording longer"):
        model.generate(prompts, drafts=texts, **chunked)
    with pytest.raises(ValueError, match="transcribes audio of 8000 Hz, but the model reads 16000"):
        model.generate(prompts, assistant_model=Transcriber({}, 8000), max_new_tokens=4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(drafts=["a"]), "1 drafts for 3 prompts; give one each"),
        (dict(drafts="abc"), "drafts='abc' must be a list of texts"),
        (dict(drafts=["a"] * 3, prompt_lookup_num_tokens=3), "give one source of drafts"),
        (dict(prompt_lookup_num_tokens=3, num_beams=2), "beam search has no drafts"),
        (dict(prompt_lookup_num_tokens=0), "prompt_lookup_num_tokens=0 must be a whole number"),
        (dict(assistant_model=object()), "must be an ASRModel, a CTCModel, a SALM, or the direct"),
        (dict(use_mtp=True), "drafts by the LLM itself are not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, **wrong)


def responses_of(rounds):
    """Response and draft counts of each prompt, in order."""
    finished = {response.number: response for ended in rounds for response in ended}
    return [finished[number] for number in range(len(finished))]


def test_continuous_batching_takes_drafts(model, plain, monkeypatch):
    right = as_texts(monkeypatch, model, plain[:, -12:])
    asked = dict(drafts=[right[0], "", right[1]], slots=2, max_new_tokens=12)
    found = responses_of(model.generate_each(PROMPTS, **asked))
    assert [r.ids.tolist() for r in found] == plain[:, -12:].tolist()
    assert [(r.drafted, r.accepted) for r in found[:2]] == [(10, 10), (0, 0)]
    assert found[2].accepted < found[2].drafted
    number, ids = found[0]
    assert number == 0 and ids is found[0].ids, "a pair, as without drafts"


@pytest.mark.slow
def test_continuous_batching_has_the_tokens_of_generate_from_every_source(model, monkeypatch):
    draw = np.random.default_rng(0)
    waves = [draw.normal(size=n).astype(np.float32) * 0.1 for n in (60000, 9000, 20000, 8000, 7000)]
    turn = {"role": "user", "content": f"Say: {model.audio_locator_tag}"}
    prompts = [[{**turn, "audio": [wave]}] for wave in waves]
    for asked in (
        dict(max_new_tokens=12),
        dict(max_new_tokens=12, do_sample=True, temperature=1.5, seed=2, no_repeat_ngram_size=2),
    ):
        expected = model.generate(prompts, **asked)
        texts = as_texts(monkeypatch, model, expected)
        assistant = Transcriber({len(w): t for w, t in zip(waves, texts, strict=True)})
        for source in (dict(assistant_model=assistant), dict(prompt_lookup_num_tokens=4)):
            found = responses_of(model.generate_each(prompts, slots=2, **source, **asked))
            for own, row in zip(found, expected, strict=True):
                assert own.ids.tolist() == row[: len(own.ids)].tolist()
                assert (row[len(own.ids) :] == model.text_pad_id).all()
            rate = sum(r.accepted for r in found) / sum(r.drafted for r in found)
            assert rate > 0.9 if "assistant_model" in source else rate < 0.9
    chunked = dict(max_new_tokens=12, max_audio_s=2.0)
    anything = Transcriber(dict.fromkeys(range(70000), texts[0]))
    expected = [r.ids.tolist() for r in responses_of(model.generate_each(prompts, **chunked))]
    found = responses_of(model.generate_each(prompts, assistant_model=anything, **chunked))
    assert [r.ids.tolist() for r in found] == expected
    with pytest.raises(ValueError, match="prompt 0: drafts: not supported with a recording longer"):
        list(model.generate_each(prompts, drafts=texts, **chunked))
    with pytest.raises(ValueError, match="prompt 2: drafts has 2 texts; give one each"):
        list(model.generate_each(prompts, drafts=texts[:2], max_new_tokens=12))


def test_tokens_of_the_same_letters_are_of_one_class(model):
    classes = token_classes(model.tokenizer, model.text_vocab_size)
    tokens = model.tokenizer.ids_to_tokens(list(range(len(model.tokenizer))))
    assert len(classes) == model.text_vocab_size
    by_token = dict(zip(tokens, classes.tolist(), strict=False))
    lower, upper, start = (by_token[t] for t in ("a", "A", "▁a"))
    assert lower == upper and start == lower + 1
    assert by_token["."] // 2 == by_token[","] // 2 == 0 != lower // 2
