"""A smaller SALM or an LLM as `assistant_model`: the same tokens, from its proposals."""

import json
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.models import SALM, DraftLLM
from speechlm2_jax.settings import SettingsError

ROOT = Path(__file__).parents[2]
SALM_DIRECTORY = ROOT / "tests" / "data" / "salm" / "llama_adapter_hf"
TEXTS = [[{"role": "user", "content": text}] for text in ("What time is it?", "Yes", "No. Why?")]
WHOLE = dict(max_new_tokens=12, return_dict_in_generate=True)


@pytest.fixture(scope="module")
def model():
    return SALM.from_pretrained(SALM_DIRECTORY).eval()


@pytest.fixture(scope="module")
def llm(model, tmp_path_factory):
    """The directory of the model's own LLM: it proposes what the model generates."""
    folder = tmp_path_factory.mktemp("llm")
    model.save_llm(folder)
    return folder


@pytest.fixture(scope="module")
def spoken(model):
    draw = np.random.default_rng(0)
    waves = [draw.normal(size=n).astype(np.float32) * 0.1 for n in (20000, 9000, 15000)]
    turn = {"role": "user", "content": f"Say: {model.audio_locator_tag}"}
    return [[{**turn, "audio": [wave]}] for wave in waves]


def test_an_llm_with_the_same_tokenizer_proposes_tokens(model, llm):
    expected = model.generate(TEXTS, max_new_tokens=12)
    found = model.generate(TEXTS, assistant_model=str(llm), **WHOLE)
    np.testing.assert_array_equal(found.sequences, expected)
    # 4 drafts per pass by default: 1 token, then 5, 5 and 1
    assert found.accepted.tolist() == found.drafted.tolist() == [8, 8, 8]


def test_another_tokenizer_is_refused_in_one_line(model, llm, tmp_path):
    for file in llm.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokens = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    by_id = {index: token for token, index in vocabulary.items()}
    vocabulary[by_id[100]], vocabulary[by_id[101]] = 101, 100
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(
        ValueError, match="^assistant_model: token 100 is .* for the draft LLM; use"
    ):
        model.generate(TEXTS, assistant_model=tmp_path, max_new_tokens=4)


def test_what_is_no_llm_is_refused(model):
    with pytest.raises(SettingsError, match="assistant_model: .* is a SALM; name a causal LLM"):
        DraftLLM.from_pretrained(SALM_DIRECTORY)


@pytest.mark.slow
def test_a_salm_reads_the_recordings_too(model, spoken):
    expected = model.generate(spoken, max_new_tokens=12)
    found = model.generate(spoken, assistant_model=model, num_assistant_tokens=3, **WHOLE)
    np.testing.assert_array_equal(found.sequences, expected)
    assert found.accepted.tolist() == found.drafted.tolist() == [8, 8, 8]


@pytest.mark.slow
@pytest.mark.parametrize("drawn", [{}, dict(do_sample=True, temperature=1.5, seed=4)])
def test_an_llm_without_audio_and_continuous_batching(model, llm, spoken, drawn):
    expected = model.generate(spoken, max_new_tokens=12, **drawn)
    deaf = model.generate(spoken, assistant_model=llm, **WHOLE, **drawn)
    np.testing.assert_array_equal(deaf.sequences, expected)
    assert deaf.accepted.sum() < deaf.drafted.sum()
    for assistant, least in ((llm, 0.0), (model, 1.0)):
        rounds = model.generate_each(
            spoken, slots=2, assistant_model=assistant, max_new_tokens=12, **drawn
        )
        finished = {f.number: f for ended in rounds for f in ended}
        for number, row in enumerate(expected):
            ids = finished[number].ids
            assert ids.tolist() == row[: len(ids)].tolist()
        rate = sum(f.accepted for f in finished.values()) / sum(
            f.drafted for f in finished.values()
        )
        assert rate >= least
