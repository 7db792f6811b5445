"""Counting tokens word by word gives what encoding whole texts gives."""

import pickle
import random
from pathlib import Path

import pytest
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from speechlm2_jax.data import Tokenizer, word_counts
from speechlm2_jax.data.word_counts import SPLITS, TokenCount, has_separate_words
from tests.data_pipeline.small_corpus import TAG

ROOT = Path(__file__).parents[2]
BPE = ROOT / "tests" / "data" / "prompts" / "tok_bpe"
PIECES = (
    *("a", "b", " ", "  ", "\n", "\t", "1", "23", "é", "\u0301", "你", "好", "'s", "'S", ".", "!!"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", TAG, "<|", "\u00a0", "\u2009", "\x1c"),
    *("\U0001f642", "ß", "user\n", "word", " the", "\r\n", " x", "long" * 20),
)


def texts_and_spans(count):
    draw = random.Random(0)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(0, 25))) for _ in range(count)]
    spans = [sorted(draw.choices(range(len(text) + 1), k=2)) for text in texts]
    return texts, [(begin, end) for begin, end in spans]


def encoded(tokenizer, texts, spans, wanted):
    pairs = tokenizer._backend.encode_with_places(texts, spans)
    return [TokenCount(len(ids), ids.count(wanted), place) for ids, place in pairs]


@pytest.fixture(params=["tiny_llm", "tok_bpe"])
def tokenizer(request):
    folder = BPE if request.param == "tok_bpe" else ROOT / "configs" / "parts" / request.param
    made = Tokenizer(folder)
    made.add_special_tokens([TAG])
    return made


def test_counts_are_those_of_whole_texts(tokenizer, monkeypatch):
    wanted = tokenizer.token_to_id(TAG)
    assert tokenizer._counter_of(wanted) is not None
    texts, spans = texts_and_spans(800)
    monkeypatch.setattr(word_counts, "MOST_WORDS", 300)  # forgets now and then
    for start in range(0, len(texts), 100):
        part = slice(start, start + 100)
        expected = encoded(tokenizer, texts[part], spans[part], wanted)
        assert tokenizer.count(texts[part], wanted, spans[part]) == expected
    without = [(one.tokens, one.found) for one in tokenizer.count(texts[:50], wanted)]
    assert without == [(len(ids), ids.count(wanted)) for ids in tokenizer.texts_to_ids(texts[:50])]


def test_a_wanted_word_and_new_tokens_are_counted(tokenizer):
    (word,) = tokenizer.text_to_ids(" the")[-1:]
    text = "over the zyxwv and the sun"
    expected = tokenizer.text_to_ids(text).count(word)
    assert tokenizer.count([text], word)[0].found == expected >= 2
    before = tokenizer.count(["a zyxwv b"], 0)[0].tokens
    tokenizer.add_special_tokens(["zyxwv"])
    after = tokenizer.count(["a zyxwv b"], 0)[0].tokens
    assert after == len(tokenizer.text_to_ids("a zyxwv b")) < before
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.count(["a zyxwv b"], 0)[0].tokens == after


def test_what_may_reach_over_a_space_is_encoded_whole():
    def made(pre_tokenizer, normalizer=None, **model):
        backend = Backend(models.BPE(**model))
        backend.pre_tokenizer = pre_tokenizer
        if normalizer is not None:
            backend.normalizer = normalizer
        return backend

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    known = pre_tokenizers.Split(Regex(min(SPLITS)), "isolated")
    for pre_tokenizer in (byte_level, digits, known):
        assert has_separate_words(made(pre_tokenizer))
        assert has_separate_words(made(pre_tokenizer, normalizers.NFC()))
    other = pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")
    for pre_tokenizer in (
        *(None, other, pre_tokenizers.Metaspace()),
        *(pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(use_regex=False)),
        pre_tokenizers.Split(Regex(min(SPLITS)), "merged_with_next"),
    ):
        assert not has_separate_words(
            made(pre_tokenizer) if pre_tokenizer else Backend(models.BPE())
        )
    assert not has_separate_words(made(byte_level, normalizers.Strip()))
    assert not has_separate_words(made(byte_level, dropout=0.1))
    llama = Tokenizer(ROOT / "tests" / "data" / "prompts" / "tok_spm")
    texts, spans = texts_and_spans(20)
    assert llama._counter_of(3) is None
    assert llama.count(texts, 3, spans) == encoded(llama, texts, spans, 3)
