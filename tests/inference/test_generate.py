"""Invariants of `generate` and `stream`: same tokens for any batching, few compiled programs."""

import importlib.util
import itertools
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import GenerationConfig

from speechlm2_jax.data.prompts import PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference import generate
from speechlm2_jax.inference.request.generation_request import read_request
from speechlm2_jax.inference.request.keys import HONOURED, IGNORED, REFUSED
from speechlm2_jax.models import SALM

ROOT = Path(__file__).parents[2]
PROMPTS = [[{"role": "user", "content": text}] for text in ("What time is it?", "Yes", "No. Why?")]
DRAWN = dict(do_sample=True, num_return_sequences=2, max_new_tokens=12, temperature=1.5, seed=5)


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(ROOT / "tests" / "data" / "salm" / "llama_adapter_hf").eval()


@pytest.fixture(scope="module")
def drawn(model):
    """Two responses to each of three prompts, and their prompts' width."""
    ids = model.generate(PROMPTS, **DRAWN)
    return ids[:, -12:]


def programs() -> int:
    return generate.prefill._cache_size() + generate.decode._cache_size()


def joined(pieces, rows):
    """Ids and texts of each row, put together again."""
    ids, texts = [[] for _ in range(rows)], [""] * rows
    for piece in pieces:
        ids[piece.row] += piece.ids.tolist()
        texts[piece.row] += piece.text
    return ids, texts


@pytest.mark.parametrize("at_once", [1, 5])
def test_a_stream_equals_generate(model, drawn, at_once):
    before = programs()
    pieces = list(model.stream(PROMPTS, **DRAWN, tokens_at_once=at_once))
    ids, texts = joined(pieces, len(drawn))
    assert ids == drawn.tolist()
    assert texts == [model.tokenizer.ids_to_text(row) for row in drawn]
    assert [piece.row for piece in pieces if piece.is_last] == list(range(len(drawn)))
    assert all(len(piece.ids) == 1 for piece in pieces[: len(drawn)]), "the first comes at once"
    assert programs() == before, "generate and stream run the same programs"


def test_the_first_of_several_responses_is_the_only_one(model, drawn):
    single = model.generate(PROMPTS, **{**DRAWN, "num_return_sequences": 1})[:, -12:]
    np.testing.assert_array_equal(single, drawn[::2])
    assert all(one.tolist() != other.tolist() for one, other in drawn.reshape(3, 2, 12))


def test_logprobs_of_new_tokens_are_returned(model, drawn):
    asked = dict(DRAWN, return_dict_in_generate=True, token_logprobs=True)
    found = model.generate(PROMPTS, **asked)
    assert found.sequences[:, -12:].tolist() == drawn.tolist()
    assert found.token_logprobs.shape == drawn.shape
    assert (found.token_logprobs < 0).any() and (found.token_logprobs <= 0).all()


def test_leaving_the_loop_or_saying_stop_gives_what_there_is(model, drawn):
    first = list(itertools.islice(model.stream(PROMPTS, **DRAWN), len(drawn)))
    assert joined(first, len(drawn))[0] == drawn[:, :1].tolist()
    asked = iter([False, True])
    begun = model.generate(PROMPTS, **DRAWN, should_stop=lambda: next(asked))[:, -12:]
    np.testing.assert_array_equal(begun, drawn)  # the second check finds it done
    now = threading.Event()
    threading.Thread(target=now.set).start()
    now.wait()
    stopped = model.generate(PROMPTS, **DRAWN, should_stop=now.is_set)
    np.testing.assert_array_equal(stopped[:, -1:], drawn[:, :1])
    last = list(model.stream(PROMPTS, **DRAWN, should_stop=now.is_set))[-len(drawn) :]
    assert all(piece.is_last and not len(piece.ids) for piece in last)
    late = model.generate(PROMPTS, **DRAWN, max_time=1e-9)
    np.testing.assert_array_equal(late, stopped)


def test_values_make_no_new_programs(model, drawn):
    keys = dict(
        repetition_penalty=1.2,
        top_p=0.9,
        min_p=0.01,
        min_new_tokens=3,
        bad_words_ids=[[7], [8, 9]],
        suppress_tokens=[4],
    )
    model.generate(PROMPTS, **DRAWN, **keys)
    before = programs()
    other = dict(
        repetition_penalty=3.0,
        top_p=0.5,
        min_p=0.2,
        min_new_tokens=7,
        bad_words_ids=[[11, 12], [5], [3, 4], [9]],
        suppress_tokens=[4, 5, 6, 7],
    )
    drawn = {**DRAWN, "temperature": 0.3, "seed": 8, "max_new_tokens": 9}
    model.generate(PROMPTS, **drawn, **other)
    assert programs() == before


def test_a_stop_string_ends_a_response_and_lengths_are_per_sequence(model):
    whole = model.generate(PROMPTS, max_new_tokens=12)
    prompt = whole.shape[1] - 12
    text_of = model.tokenizer.ids_to_text
    text = text_of(whole[0, prompt:])
    string = text[len(text) // 2 :][:2]
    stopped = model.generate(PROMPTS, max_new_tokens=12, stop_strings=string)
    for row, free in zip(stopped[:, prompt:], whole[:, prompt:].tolist(), strict=True):
        end = next((n for n in range(1, 13) if string in text_of(free[:n])), 12)
        assert row.tolist() == (free[:end] + [model.text_pad_id] * 12)[: len(row)]
    assert (stopped[0, prompt:] == model.text_pad_id).any() or stopped.shape < whole.shape
    lengths = [len(row[row != model.text_pad_id]) for row in model.generate(PROMPTS, max_length=40)]
    assert lengths == [40, 40, 40]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(num_beans=4), "does not know 'num_beans'; did you mean num_beams?"),
        (dict(guidance_scale=1.5), "guidance_scale=1.5 is not supported: classifier-free"),
        (dict(streamer=object()), "use model.stream"),
        (dict(temperature=0.0, do_sample=True), "temperature=0.0 must be a positive number; or"),
        (dict(top_p=1.5, do_sample=True), r"top_p=1.5 must be a number in \[0, 1\]"),
        (dict(num_return_sequences=2), "greedy decoding gives one sequence"),
        (dict(num_return_sequences=3, num_beams=2), "exceeds num_beams=2"),
        (dict(bad_words_ids=[[3, 400]]), r"bad_words_ids: \[400\] are not token ids"),
        (dict(early_stopping="soon", num_beams=2), "true, false or never"),
        (dict(min_new_tokens=5, max_new_tokens=4), "exceeds max_new_tokens=4"),
        (dict(max_length=8), "leaves no room after a prompt of"),
        (dict(output_logits=True), "logits of each token are not kept"),
        (dict(token_logprobs=True), "token_logprobs needs return_dict_in_generate=True"),
        (
            dict(token_logprobs=True, return_dict_in_generate=True, num_beams=2),
            "token_logprobs is not supported with num_beams",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        model.generate(PROMPTS, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(top_p="0.9"), r"top_p='0.9' must be a number in \[0, 1\]"),
        (dict(min_p=np.nan), r"min_p=nan must be a number in \[0, 1\)"),
        (dict(temperature=[1.0]), r"temperature=\[1.0\] must be a positive number"),
        (dict(num_beams="x"), "num_beams='x' must be a whole number from 1"),
        (dict(num_beams=True), "num_beams=True must be a whole number from 1"),
        (dict(max_new_tokens=2**40), r"must be a whole number from 1, below 2\^31"),
        (dict(top_k=[5]), r"top_k=\[5\] must be a whole number; 0 or -1 keeps"),
        (dict(seed="x"), "seed='x' must be a whole number of 64 bits"),
        (dict(max_time="1 s"), "max_time='1 s' must be a positive number"),
        (dict(max_audio_s=True), "max_audio_s=True must be at least 1, or false: give seconds"),
        (dict(do_sample="no"), "do_sample='no' must be true or false"),
        (dict(should_stop=3), "should_stop=3 must be a function"),
        (dict(length_penalty="x", num_beams=2), "length_penalty='x' must be a number"),
        (dict(bad_words_ids=[350]), r"bad_words_ids=\[350\] must be a list of lists of token ids"),
        (dict(bad_words_ids=[[3], []]), "must be a list of lists of token ids"),
        (dict(sequence_bias=3), "sequence_bias=3 must be pairs of token ids and a number"),
        (dict(sequence_bias=[[[3], 1.0], 3]), "must be pairs"),
        (dict(sequence_bias=[[3], 1]), r"sequence_bias=\[\[3\], 1\] must be pairs"),
        (dict(sequence_bias={(3, 400): 1.0}), r"sequence_bias: \[400\] are not token ids"),
        (dict(stop_strings=3), "stop_strings=3 must be a text, or a list of them"),
        (dict(stop_strings=""), "an empty one would end every response"),
        (dict(stop_strings=["a", ""]), "an empty one would end every response"),
        (dict(exponential_decay_length_penalty=3), r"must be \[start, factor\]"),
        (
            dict(forced_eos_token_id=99999),
            r"forced_eos_token_id: \[99999\] are not token ids; .* 0 to 367",
        ),
        (dict(forced_bos_token_id=[3, 4]), r"forced_bos_token_id=\[3, 4\] must be one token id"),
        (dict(suppress_tokens="a"), "suppress_tokens='a' must be one token id, or a list"),
        (dict(eos_token_id=-1), r"eos_token_id: \[-1\] are not token ids"),
        (dict(pad_token_id=-1), r"pad_token_id: \[-1\] are not token ids"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused_by_name(model, wrong, message):
    with pytest.raises(ValueError, match=message):
        read_request(model, wrong)


def test_numbers_and_ids_of_every_kind_are_taken(model):
    keys = dict(
        do_sample=np.bool_(True),
        top_p=np.float32(0.5),
        top_k=np.int64(5),
        max_new_tokens=np.int64(5),
        max_time=np.float32(2.0),
        eos_token_id=np.array([3, 4]),
        bad_words_ids=np.array([[5, 6]]),
        sequence_bias={(7,): -np.inf},
        suppress_tokens=[],
        stop_strings=(),
        max_audio_s=False,
    )
    request = read_request(model, keys)
    assert request.decoding.stop_ids == (3, 4) and request.max_audio_s is None
    assert (request.max_new_tokens, request.max_time_s) == (5, 2.0)


def test_a_stream_of_beams_is_refused_at_the_call(model):
    with pytest.raises(ValueError, match="num_beams: beam search cannot be streamed"):
        model.stream(PROMPTS, num_beams=2)


def test_a_key_without_effect_is_told(model):
    with pytest.warns(UserWarning, match="temperature=0.7 has no effect without do_sample=True"):
        read_request(model, {"temperature": 0.7})
    with pytest.warns(UserWarning, match="length_penalty=2.0 has no effect without num_beams"):
        read_request(model, {}, {"length_penalty": 2.0})


def test_a_config_and_a_dict_are_the_same_request_and_keywords_win(model):
    keys = dict(num_beams=4, length_penalty=0.5, max_new_tokens=7, repetition_penalty=1.5)
    one = read_request(model, GenerationConfig(**keys), {"max_new_tokens": 9})
    assert one == read_request(model, keys | {"max_new_tokens": 9})
    assert one.max_new_tokens == 9 and one.decoding.beams.count == 4


def test_every_key_of_a_generation_config_is_known_and_on_the_page():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        keys = {key for key in vars(GenerationConfig()) if not key.startswith("_")}
    tables = (HONOURED, IGNORED, REFUSED)
    assert not keys - {key for table in tables for key in table}
    assert sum(map(len, tables)) == len({key for table in tables for key in table})
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "make_generation.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.render(text), "run: PYTHONPATH=. python docs/make_generation.py"


def test_a_thought_is_opened_or_already_over_as_asked(model):
    thoughtful = PromptFormatter(
        "qwen3", Tokenizer(ROOT / "tests" / "data" / "prompts" / "tok_bpe")
    )
    told = {
        enabled: thoughtful.encode_dialog(PROMPTS[0], enable_thinking=enabled).input_ids.tolist()
        for enabled in (True, False)
    }

    engine = replace(model._engine(), prompt_formatter=thoughtful)
    for asked, enabled in ((None, True), (True, True), (False, False)):
        _, ids = generate.prepare_prompts(
            engine, generate.PromptInputs(PROMPTS[:1]), enable_thinking=asked
        )
        assert ids.tolist() == [told[enabled]]
    assert told[True] != told[False]
    for ask in (model.generate, lambda *a, **k: list(model.stream(*a, **k))):
        with pytest.raises(ValueError, match="'llama2' has no thinking mode"):
            ask(PROMPTS, enable_thinking=False)
    with pytest.raises(ValueError, match="enable_thinking='no' must be true or false"):
        model.generate(PROMPTS, generation_config={"enable_thinking": "no"})
