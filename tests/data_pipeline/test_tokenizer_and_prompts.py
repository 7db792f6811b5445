"""Tokenizers use NeMo's names, and a format is refused for a tokenizer that lacks its tokens."""

from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.data.prompts import FORMATS, PromptError, PromptFormatter
from speechlm2_jax.data.tokenizer import Tokenizer, TokenizerError
from speechlm2_jax.data.tokenizer_file import is_generic
from tests.data_pipeline.chat_templates import CHATML, MISTRAL, tokenizer_with

DATA = Path(__file__).parents[1] / "data"
TAG = "<|audioplaceholder|>"


@pytest.fixture
def llama():
    return Tokenizer(DATA / "llm" / "llama")


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    import sentencepiece

    folder = tmp_path_factory.mktemp("spm")
    text = folder / "text.txt"
    text.write_text("\n".join(f"the quick brown fox {n} jumps over {n * 7}" for n in range(200)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tiny"), vocab_size=60, minloglevel=9
    )
    return folder / "tiny.model"


def test_an_added_token_takes_the_first_free_id_and_is_never_split(llama):
    free = len(llama)
    assert llama.add_special_tokens([TAG]) == 1
    assert llama.token_to_id(TAG) == free == len(llama) - 1
    assert llama.text_to_ids(f"a {TAG} b").count(free) == 1
    assert llama.add_special_tokens({"additional_special_tokens": [TAG]}) == 0


@pytest.mark.parametrize(
    "encode",
    [
        lambda tokenizer, text: tokenizer.text_to_ids(text),
        lambda tokenizer, text: tokenizer.texts_to_ids(["", text])[1],
        lambda tokenizer, text: tokenizer.texts_with_offsets(["", text])[1][0],
    ],
)
def test_a_token_without_an_embedding_is_an_error_but_for_the_placeholder(encode, llama):
    tokenizer, rows = llama, len(llama)
    tokenizer.add_special_tokens(["<clip>", "<new>"])
    tokenizer.limit_ids(rows, [rows])
    assert encode(tokenizer, "a<clip>")[-1] == rows
    with pytest.raises(TokenizerError, match=rf"'<new>' of id {rows + 1}.* has {rows} rows"):
        encode(tokenizer, "a<clip><new>")


def test_padding_falls_back_to_unknown_and_then_to_zero():
    assert Tokenizer(DATA / "llm" / "qwen3").pad_id == 330
    llama = Tokenizer(DATA / "llm" / "llama")
    assert llama.pad_token is None and llama.pad_id == llama.unk_id == 0
    assert llama.pad == llama.pad_id and llama.bos == 1 and llama.eos == 2


def test_ids_decode_from_any_array_and_special_tokens_can_stay(llama):
    ids = llama.text_to_ids("yes and no")
    assert llama.ids_to_text(np.asarray([1, *ids, 2])) == "yes and no"
    assert llama.ids_to_text([1, *ids, 2], remove_special_tokens=False).startswith("<s>")
    with pytest.raises(ValueError, match="must be 1-D"):
        llama.ids_to_text(np.zeros((2, 3), int))


def test_tokens_and_ids_are_inverse_and_an_unknown_token_gives_the_unknown_id(llama):
    tokens = llama.text_to_tokens("hello you")
    assert llama.ids_to_tokens(llama.tokens_to_ids(tokens)) == tokens
    assert llama.tokens_to_text(tokens) == "hello you"
    assert llama.token_to_id("no such token") == llama.unk_id


@pytest.mark.parametrize("name", ["/nowhere/tokenizer", "./nowhere", "nowhere/at.model"])
def test_a_missing_tokenizer_is_one_clear_error(name):
    with pytest.raises(TokenizerError, match=f"tokenizer {name}: no such"):
        Tokenizer(name)


def test_a_directory_without_a_tokenizer_is_one_clear_error(tmp_path):
    with pytest.raises(TokenizerError, match="the directory has none of tokenizer.json") as caught:
        Tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["llm/llama", "llm/llama3", "llm/qwen3", "prompts/tok_bpe", "salm/automodel_hf"]
)
def test_the_quick_way_to_a_generic_tokenizer_gives_what_auto_tokenizer_does(name):
    from transformers import AutoTokenizer

    assert is_generic(DATA / name)
    auto = AutoTokenizer.from_pretrained(str(DATA / name))
    quick = Tokenizer(DATA / name)
    assert type(quick._backend._tokenizer) is type(auto)
    assert quick._backend._tokenizer.get_vocab() == auto.get_vocab()
    text = "I don't know,  asks the <|im_end|> fox </s> twice.\n"
    assert quick.text_to_ids(text) == auto(text, add_special_tokens=False)["input_ids"]
    assert quick._backend._tokenizer.special_tokens_map == auto.special_tokens_map
    assert quick._backend._tokenizer.chat_template == auto.chat_template


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class", "expected"),
    [
        ("llama", "PreTrainedTokenizerFast", True),
        ("llama", "LlamaTokenizer", False),
        ("qwen2", "PreTrainedTokenizerFast", False),
    ],
)
def test_only_a_class_that_is_sure_is_taken_the_quick_way(
    tmp_path, model_type, tokenizer_class, expected
):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert not is_generic(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(f'{{"tokenizer_class": "{tokenizer_class}"}}')
    (tmp_path / "config.json").write_text(f'{{"model_type": "{model_type}"}}')
    assert is_generic(tmp_path) == expected
    (tmp_path / "config.json").write_text("no JSON")
    assert not is_generic(tmp_path)


def test_sentencepiece_models_encode_with_added_tokens(sentencepiece_path):
    tokenizer = Tokenizer(sentencepiece_path)
    free = len(tokenizer)
    tokenizer.add_special_tokens([TAG])
    ids = tokenizer.text_to_ids(f"the fox {TAG} over")
    assert tokenizer.token_to_id(TAG) == free and ids.count(free) == 1
    assert tokenizer.ids_to_text(ids, remove_special_tokens=False) == f"the fox{TAG}over"
    assert tokenizer.ids_to_tokens(ids) == tokenizer.text_to_tokens(f"the fox {TAG} over")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, tokenizer.unk_id)
    assert tokenizer.ids_to_text([1, *tokenizer.text_to_ids("the fox"), 2]) == "the fox"


@pytest.mark.parametrize("name", [n for n, f in FORMATS.items() if f.tokens])
def test_a_format_names_the_token_that_the_tokenizer_lacks(name, sentencepiece_path):
    tokenizer = Tokenizer(sentencepiece_path)
    tokenizer.add_special_tokens(FORMATS[name].tokens[:-1])
    # `<s>` is a piece of every SentencePiece model, which no text becomes
    missing = "<s>" if name == "mistral" else FORMATS[name].tokens[-1].replace("|", r"\|")
    with pytest.raises(TokenizerError, match=f"'{name}' needs the token '{missing}'"):
        PromptFormatter(name, tokenizer)


def test_the_formats_that_fit_are_named_and_auto_where_there_is_a_template(tmp_path, llama):
    with pytest.raises(TokenizerError) as found:
        PromptFormatter("qwen", llama)
    assert "whose tokens it has: plain, llama2, mistral" in str(found.value)
    assert "would split into 11; set prompt_format to one" in str(found.value)
    own = tokenizer_with(CHATML, tmp_path / "own", "llm/llama")
    with pytest.raises(TokenizerError, match=r"set prompt_format to auto \(the tokenizer's own"):
        PromptFormatter("qwen", own)


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_one_warning_where_the_template_has_not_the_formats_plain_markup(tmp_path, caplog, name):
    tokenizer = tokenizer_with(CHATML, tmp_path / "chatml")
    for _ in range(2):
        PromptFormatter(name, tokenizer)
    (record,) = caplog.records
    assert name in record.message and "[INST]" in record.message and "auto" in record.message
    caplog.clear()
    PromptFormatter(name, tokenizer_with(MISTRAL, tmp_path / "mistral"))
    PromptFormatter(name, tokenizer_with(None, tmp_path / "none"))
    assert not caplog.records


def test_a_format_that_needs_a_begin_token_refuses_a_tokenizer_without_one():
    with pytest.raises(TokenizerError, match="needs a begin-of-sequence token"):
        PromptFormatter("llama2", Tokenizer(DATA / "llm" / "qwen3"))


def test_text_that_looks_like_markup_stays_text(llama):
    formatter = PromptFormatter("llama2", llama)
    turn = {"role": "system_and_user", "slots": {"system": "|message|", "message": "|eos|"}}
    ids = formatter.encode_dialog([turn]).input_ids
    assert llama.ids_to_text(ids) == "[INST] <<SYS>>\n|message|\n<</SYS>>\n\n|eos| [/INST]"
    plain = PromptFormatter("plain", llama)
    assert plain.encode_dialog([{"role": "user", "content": "x|eos|"}]).input_ids[-1] != 2


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], "empty dialog"),
        ([{"role": "user"}], "needs a text for 'message'"),
        ([{"role": "user", "slots": {"message": 3}}], "needs a text for 'message'"),
        ([{"content": "x"}], "has no role 'None'"),
        ([{"role": "bot", "content": "x"}], "has no role 'bot'; roles: system_and_user, user"),
    ],
)
def test_a_dialog_that_cannot_be_expressed_names_what_is_wrong(llama, turns, message):
    with pytest.raises(PromptError, match=message):
        PromptFormatter("llama2", llama).encode_dialog(turns)


def test_encoding_many_dialogs_equals_encoding_each(llama):
    formatter = PromptFormatter("llama2", llama)
    dialogs = [[{"role": "user", "content": f"turn {n}"}] for n in range(5)]
    together = formatter.encode_dialogs(dialogs)
    for dialog, prompt in zip(dialogs, together, strict=True):
        np.testing.assert_array_equal(prompt.input_ids, formatter.encode_dialog(dialog).input_ids)


@pytest.mark.parametrize("name", ["qwen", "llama2", "plain"])
def test_the_context_is_the_same_with_and_without_the_response(name):
    tokenizer = Tokenizer(Path(__file__).parents[2] / "configs" / "parts" / "tiny_llm")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    formatter = PromptFormatter(name, tokenizer)
    question = {"role": "user", "slots": {"message": "What?"}}
    response = {"role": "assistant", "slots": {"message": "That."}}
    whole = formatter.encode_dialog([question, response])
    asked = formatter.encode_dialog([question])
    np.testing.assert_array_equal(whole.prompt_ids, asked.input_ids)
