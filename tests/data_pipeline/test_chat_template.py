"""`prompt_format: auto`: ids of transformers' `apply_chat_template`, and the responses in them."""

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import soundfile

from speechlm2_jax.data import DataModule, SALMDataset, Tokenizer
from speechlm2_jax.data.prompts import PromptError, PromptFormatter, chat_template
from speechlm2_jax.data.prompts.chat_template import ChatTemplate
from speechlm2_jax.data.prompts.thinking import Message
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline import chat_templates as templates
from tests.data_pipeline.chat_templates import TAG, tokenizer_with

NAMES = [n for n, value in vars(templates).items() if n.isupper() and isinstance(value, str)]
NAMES = [name for name in NAMES if name not in ("TAG",)]
USER = {"role": "user", "content": f"Say  this: {TAG}"}
RESPONSE = {"role": "assistant", "content": "ok then"}
MORE = [{"role": "user", "content": "and more?"}, {"role": "assistant", "content": "fine, yes"}]
SYSTEM = {"role": "system", "content": "Be nice."}
KINDS = ("tok_bpe", "tok_spm")
DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("templates")


@pytest.fixture
def make(folder):
    def make(name, kind="tok_bpe"):
        source = getattr(templates, name)
        return PromptFormatter(
            "auto", tokenizer_with(source, folder / f"{name}-{kind}", f"prompts/{kind}")
        )

    return make


def learnt(formatter, prompt):
    """The texts of the runs of tokens that have a loss."""
    steps = np.flatnonzero(np.diff(prompt.mask.astype(int), prepend=0, append=0)).reshape(-1, 2)
    to_text = formatter.tokenizer.ids_to_text
    return [to_text(prompt.input_ids[a:b], remove_special_tokens=False) for a, b in steps]


def of_transformers(tokenizer, dialog, **more):
    from transformers import PreTrainedTokenizerFast

    reference = PreTrainedTokenizerFast.from_pretrained(tokenizer.name)
    return reference.apply_chat_template(dialog, return_dict=False, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_transformers(make, name, kind):
    formatter = make(name, kind)
    asked = [[USER], [USER, RESPONSE, MORE[0]]]
    asked += [[SYSTEM, USER]] if name in templates.WITH_SYSTEM else []
    for dialog in asked:
        expected = of_transformers(formatter.tokenizer, dialog, add_generation_prompt=True)
        prompt = formatter.encode_dialog(dialog)
        assert prompt.input_ids.tolist() == expected and prompt.mask is None
        tag = formatter.tokenizer.require(TAG, "a test")
        assert name == "MANY_STEPS" or np.sum(prompt.input_ids == tag) == 1
    for dialog in ([USER, RESPONSE], [USER, RESPONSE, *MORE]):
        if name in ("OPENS_A_THOUGHT", "MANY_STEPS"):  # no response can be found in them
            continue
        whole = formatter.encode_dialog(dialog)
        assert whole.input_ids.tolist() == of_transformers(formatter.tokenizer, dialog)
        prompt = of_transformers(formatter.tokenizer, dialog[:-1], add_generation_prompt=True)
        assert whole.prompt_ids.tolist() == prompt


def assert_lengths(formatter, dialogs, tag):
    lengths = formatter.lengths(dialogs, tag)
    for length, prompt in zip(lengths, formatter.encode_dialogs(dialogs), strict=True):
        assert length.tokens == len(prompt.input_ids)
        assert length.context == len(prompt.context_ids)
        assert length.placeholders == np.sum(prompt.input_ids == tag)
        assert length.has_response == (prompt.answer_ids is not None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("OPENS_A_THOUGHT", "MANY_STEPS")])
def test_lengths_are_those_of_the_prompts(make, name, kind):
    formatter = make(name, kind)
    spaced = {"role": "assistant", "content": "  spaced  \u4f60\u597d "}
    dialogs = [[USER], [USER, RESPONSE], [USER, RESPONSE, *MORE], [USER, spaced]]
    assert_lengths(formatter, dialogs, formatter.tokenizer.require(TAG, "a test"))


@pytest.mark.parametrize("name", ["qwen", "plain", "llama3", "qwen3", "gemma"])
def test_lengths_are_those_of_the_prompts_in_formats_too(name):
    tokenizer = Tokenizer(DATA / "prompts" / "tok_bpe")
    tokenizer.add_special_tokens([TAG])
    formatter = PromptFormatter(name, tokenizer)
    dialogs = [[USER], [USER, RESPONSE], [USER, RESPONSE, *MORE]]
    assert_lengths(formatter, dialogs, tokenizer.require(TAG, "a test"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CHATML", ["ok then<|im_end|>", "fine, yes<|im_end|>"]),
        ("DEFAULT_SYSTEM", ["ok then<|im_end|>", "fine, yes<|im_end|>"]),
        ("LLAMA3", ["ok then<|eot_id|>", "fine, yes<|eot_id|>"]),
        ("GEMMA", ["ok then<end_of_turn>", "fine, yes<end_of_turn>"]),
        ("MISTRAL", [" ok then</s>", " fine, yes</s>"]),
        ("OTHER_END", ["ok then", "fine, yes</s>"]),  # not the "<" that both ends begin with
        ("NO_END", ["ok then", "fine, yes"]),
        ("PHI3", ["ok then<|im_end|>", "fine, yes<|im_end|>\n</s>"]),
        # earlier responses lose their thoughts: the model would not write them like that
        ("THINKING", ["<think>\n\n</think>\n\nfine, yes<|im_end|>"]),
        # its generation prompt opens a thought, which no response of it has: the tags count
        ("TAGGED", ["ok then<|im_end|>", "fine, yes<|im_end|>"]),
        (
            "WHOLE_TURNS",
            [f"<|im_start|>assistant\n{text}<|im_end|>\n" for text in ("ok then", "fine, yes")],
        ),
    ],
)
def test_each_response_is_learnt_with_its_end_marker(make, name, kind, expected):
    formatter = make(name, kind)
    prompt = formatter.encode_dialog([USER, RESPONSE, *MORE])
    found = learnt(formatter, prompt)
    # SentencePiece writes a space after each special token
    assert [text.replace(" ", "") for text in found] == [t.replace(" ", "") for t in expected]
    split = len(prompt.context_ids)
    np.testing.assert_array_equal(
        np.concatenate([prompt.context_ids, prompt.answer_ids]), prompt.input_ids
    )
    assert prompt.mask[split] and not prompt.mask[split - 1]
    if name not in ("TAGGED", "WHOLE_TURNS", "THINKING"):
        np.testing.assert_array_equal(prompt.context_ids, prompt.prompt_ids)


def test_one_warning_where_nothing_ends_a_response(make, caplog):
    chat_template._warn_of_no_end.cache_clear()
    for name in ("CHATML", "NO_END", "NO_END"):
        make(name).encode_dialogs([[USER, RESPONSE], [USER, RESPONSE, *MORE]])
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "writes nothing after a response" in caplog.text


def test_a_written_thought_is_learnt_and_an_earlier_one_is_not(make):
    formatter = make("THINKING")
    thoughtful = [
        {**turn, "content": f"<think>\nhm\n</think>\n\n{turn['content']}"}
        for turn in (RESPONSE, MORE[1])
    ]
    prompt = formatter.encode_dialog([USER, thoughtful[0], MORE[0], thoughtful[1]])
    assert learnt(formatter, prompt) == ["<think>\nhm\n</think>\n\nfine, yes<|im_end|>"]
    assert formatter.can_think and not make("CHATML").can_think
    quiet = formatter.encode_dialog([USER], enable_thinking=False).input_ids
    opened = formatter.tokenizer.text_to_ids("<think>\n\n</think>\n\n")
    assert quiet[-len(opened) :].tolist() == opened
    spoken = of_transformers(
        formatter.tokenizer, [USER], add_generation_prompt=True, enable_thinking=False
    )
    assert quiet.tolist() == spoken


def test_a_response_otherwise_than_the_generation_prompt_begins_it_is_one_line(make):
    formatter = make("OPENS_A_THOUGHT")
    with pytest.raises(
        PromptError, match=r"otherwise than its generation prompt.*<think>"
    ) as found:
        formatter.encode_dialog([USER, RESPONSE])
    assert "\n" not in str(found.value) and formatter.tokenizer.name in str(found.value)


def test_a_refused_dialog_is_one_line_with_the_templates_words(make):
    formatter = make("GEMMA")
    for dialog, words in (
        ([SYSTEM, USER], "System role not supported"),
        ([RESPONSE, USER], "Roles must alternate"),
    ):
        with pytest.raises(PromptError, match=f"refuses this dialog: {words}"):
            formatter.encode_dialog(dialog)


def test_a_turn_that_the_template_leaves_out_is_an_error(folder):
    source = templates.CHATML.replace(
        "in messages %}", "in messages if message.role != 'system' %}"
    )
    formatter = PromptFormatter("auto", tokenizer_with(source, folder / "leaves out"))
    with pytest.raises(PromptError, match="leaves out the text of a turn of role 'system'"):
        formatter.encode_dialog([SYSTEM, USER])


def test_dialogs_of_a_batch_are_those_of_each_alone(make):
    formatter = make("THINKING")
    dialogs = [
        [USER],
        [USER, RESPONSE],
        [MORE[0], MORE[1]],
        [USER, RESPONSE, *MORE],
        [SYSTEM, USER],
    ]
    for prompt, dialog in zip(formatter.encode_dialogs(dialogs), dialogs, strict=True):
        alone = formatter.encode_dialog(dialog)
        np.testing.assert_array_equal(prompt.input_ids, alone.input_ids)
        np.testing.assert_array_equal(prompt.prompt_ids, alone.prompt_ids)
        assert (prompt.mask is None) == (alone.mask is None)


def test_turns_are_joined_and_a_system_turn_stays_its_own(make):
    formatter = make("CHATML")
    turns = formatter.dialog([("system", "Be nice."), ("user", "Say"), ("user", TAG)])
    text = formatter.tokenizer.ids_to_text(formatter.encode_dialog(turns).input_ids, False)
    assert text == (
        "<|im_start|>system\nBe nice.<|im_end|>\n"
        f"<|im_start|>user\nSay {TAG}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_one_call_is_of_one_moment(make, monkeypatch):
    moments = iter([datetime(2026, 3, 1), datetime(2026, 3, 2)])

    class Clock(datetime):
        @classmethod
        def now(cls):
            return next(moments)

    from speechlm2_jax.data.prompts import template_encoder

    monkeypatch.setattr(template_encoder, "datetime", Clock)
    formatter = make("LLAMA3")
    prompts = formatter.encode_dialogs([[USER, RESPONSE], [USER, RESPONSE, *MORE]])
    for prompt in prompts:
        assert "Today: 01 Mar 2026" in formatter.tokenizer.ids_to_text(prompt.input_ids)
        assert prompt.mask.any()


def test_auto_is_the_default_where_there_is_a_template(make, folder):
    tokenizer = make("CHATML").tokenizer
    assert PromptFormatter(None, tokenizer).name == "auto"
    bare = tokenizer_with(None, folder / "bare")
    with pytest.raises(
        PromptError, match="^required, because tokenizer .*bare has no chat template"
    ):
        PromptFormatter(None, bare)
    with pytest.raises(PromptError, match="'auto' needs a chat template, which tokenizer .*bare"):
        PromptFormatter("auto", bare)


def test_a_named_default_template_and_a_template_file_are_read(folder):
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}]
    assert tokenizer_with(named, folder / "named").chat_template == "y"
    tokenizer_with(None, folder / "file")
    (folder / "file" / "chat_template.jinja").write_text(templates.CHATML)
    tokenizer = Tokenizer(folder / "file")
    assert tokenizer.chat_template == templates.CHATML
    tokenizer.save(folder / "saved")
    assert Tokenizer(folder / "saved").chat_template == templates.CHATML


def test_data_without_a_format_take_the_models_or_the_template(make, folder, tmp_path):
    """And a format whose tokens the tokenizer lacks is an error of the data's own key."""
    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1, np.float32), 16000)
    row = {"audio_filepath": "a.wav", "duration": 0.5, "text": "yes", "context": "Say:"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    entry = {"manifest_filepath": str(tmp_path / "m.jsonl")}

    def text_of(tokenizer, own, **keys):
        block = {"input_cfg": [entry], "batch_size": 1, "token_equivalent_duration": 0.08, **keys}
        module = DataModule(
            {"train_ds": block}, tokenizer, SALMDataset(tokenizer, prompt_format=own)
        )
        module.setup(frame_count=lambda samples: samples // 1280)
        tokens = next(iter(module.train_batches())).arrays.tokens
        return tokenizer.ids_to_text(tokens.reshape(-1), remove_special_tokens=False)

    tokenizer = make("CHATML").tokenizer
    assert "<|im_start|>assistant" in text_of(tokenizer, None)
    assert "<|im_start|>" not in text_of(tokenizer, "plain")
    assert "<start_of_turn>user" in text_of(tokenizer, "plain", prompt_format="gemma")
    with pytest.raises(SettingsError, match=r"data.train_ds.prompt_format: .*'klingon'"):
        text_of(tokenizer, None, prompt_format="klingon")


GROWS = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}"
HOSTILE = {
    "a range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "loops in loops": "{% for i in range(999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "a product": "{{ 'a' * 10 ** 10 }}",
    "a power": "{{ 10 ** (10 ** 8) }}",
    "sums": GROWS.replace("BODY", "ns.x + ns.x"),
    "texts": GROWS.replace("BODY", "ns.x ~ ns.x"),
    "lists of lists": GROWS.replace("BODY", "[ns.x, ns.x]"),
    "dicts of dicts": GROWS.replace("BODY", "dict(a=ns.x, b=ns.x)"),
    "blocks": GROWS.replace(
        "{% set ns.x = BODY %}", "{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}"
    ),
    "a macro": "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(50) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a width": "{{ 'a'.ljust(10 ** 9) }}",
    "a width of a filter": "{{ 'a' | center(10 ** 9) }}",
    "a width of a format": "{{ '{:>999999999}'.format('a') }}{{ '%999999999d' % 1 }}",
    "an indent": "{{ ('a\n' * 99999) | indent(first=true, width=9999) }}",
    "a replacement": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "digits": "{{ 1.5 | round(10 ** 9, 'ceil') }}",
    "a sum of lists": "{{ ([[1]] * 99999) | sum(start=[]) | length }}",
    "output": "{% set x = 'a' * 99999 %}{% for i in range(99999) %}{{ x }}{% endfor %}",
    "its length": "a" * 300_000,
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "methods of other types": "{{ (1).to_bytes(10 ** 9, 'big') }}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a function's globals": "{{ raise_exception.__globals__.os }}",
    "a format's attributes": "{{ '{0.__class__.__mro__}'.format(1) + 1 }}",
    "a change": "{% set x = messages.append({'role': 'user'}) %}",
    "a private name": "{% set ns = namespace(_x=1) %}",
    "a file": "{% include '/etc/hostname' %}",
    "no Jinja": "{% for m in messages %}{{ m }}",
    "an unknown name": "{{ nothing.at.all }}",
    "types": "{{ messages + 1 }}",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_template_ends_soon_in_one_line(case):
    with pytest.raises(PromptError, match="the chat template of tokenizer T") as found:
        ChatTemplate(HOSTILE[case], "T", {}).render([Message("user", "x")])
    assert "\n" not in str(found.value) and len(str(found.value)) < 500


def test_limits_grow_with_the_dialog_so_that_no_long_one_is_refused():
    template = ChatTemplate(templates.THINKING, "T", {})
    text = "word " * 500_000
    dialog = [Message("user", text), Message("assistant", text)]
    assert template.render(dialog).text.count("word") == 1_000_000
    many = [Message(("user", "assistant")[i % 2], "a") for i in range(4000)]
    assert template.render(many).text.count("<|im_start|>") == 4000


def test_the_marker_of_a_response_is_in_no_text():
    assert not any(c.isspace() or c.isascii() for c in chat_template.MARK)
    assert json.loads(json.dumps(chat_template.MARK)) == chat_template.MARK


@pytest.mark.parametrize(
    ("name", "begin", "end"), [("CHATML", "", "<|im_end|>"), ("GEMMA", "<s>", "<end_of_turn>")]
)
def test_a_lone_response_is_its_text_between_the_templates_markers(make, name, begin, end):
    formatter = make(name, "tok_spm")
    dialogs = [[RESPONSE], [USER, RESPONSE], [{**RESPONSE, "content": "plain text"}]]
    first, second, third = formatter.encode_dialogs(dialogs)
    for prompt, text in ((first, "ok then"), (third, "plain text")):
        written = formatter.tokenizer.ids_to_text(prompt.input_ids, remove_special_tokens=False)
        assert written.replace("<s> ", "<s>") == f"{begin}{text}{end}"
        assert prompt.mask.tolist() == [not begin] + [True] * (len(prompt.mask) - 1)
        response = prompt.input_ids[len(prompt.context_ids) :]
        assert prompt.answer_ids.tolist() == response.tolist()
    alone = formatter.encode_dialog([USER, RESPONSE])
    np.testing.assert_array_equal(second.input_ids, alone.input_ids)
