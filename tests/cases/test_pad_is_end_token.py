"""Loss and attention go by position: a pad token that also ends turns is learnt and attended to."""

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.batches import BatchShape, SalmExample, assemble_salm_batch
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.inference.prompts import PromptContext, prompt_examples
from speechlm2_jax.models import SALM

DATA = Path(__file__).parents[1] / "data"
RECORDED = json.loads((DATA / "llm" / "pad_is_end.json").read_text())
DIALOG = [{"role": role, "content": text} for role, text in RECORDED["turns"][:-1]]
END = 2


def make_model(folder: Path, **changes) -> SALM:
    llm = folder / "llm"
    shutil.copytree(DATA / "llm" / "llama", llm, dirs_exist_ok=True)
    path = llm / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "</s>"}))
    cfg = json.loads((DATA / "salm" / "llama_adapter.json").read_text())["cfg_in"]
    parts = {"pretrained_llm": str(llm), "pretrained_asr": str(DATA / "salm" / "asr.nemo")}
    return SALM(cfg | parts | changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("pad_is_end"))


@pytest.fixture(scope="module")
def nemo_exact(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("nemo_exact"), nemo_exact=True)


def losses_of(model):
    tokens, mask = np.array(RECORDED["training"], np.int32), np.array(RECORDED["mask"])
    batch = assemble_salm_batch(
        [[SalmExample(id="c", tokens=tokens, loss_mask=mask)]],
        BatchShape(sequences=1, tokens=160, clips=0, samples=0),
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
    )
    run = jax.jit(lambda v, batch: model.losses(v, batch, key=None, train=False))
    return run(model.variables, jax.tree.map(jnp.asarray, batch))


def test_loss_covers_the_end_token_and_equals_transformers(model):
    assert model.text_pad_id == model.text_eos_id == END
    losses = losses_of(model)
    assert losses.loss.count == sum(RECORDED["mask"])  # two ends of earlier turns, and the last
    np.testing.assert_allclose(losses.loss.total, RECORDED["loss_sum"], rtol=1e-5)


def test_responses_after_several_turns_equal_transformers(model):
    ids = model.generate([DIALOG], max_new_tokens=12)
    prompt = RECORDED["prompt"]
    assert ids[0].tolist() == prompt + RECORDED["answer"]
    # the same from token ids with padding on the left, and from slots
    padded = np.array([[END, END, *prompt]], np.int32)
    assert model.generate(padded, max_new_tokens=12)[0, -12:].tolist() == RECORDED["answer"]
    (response,) = [a for round in model.generate_each([DIALOG], max_new_tokens=12) for a in round]
    assert response.ids.tolist() == RECORDED["answer"]


def test_nemo_exact_masks_by_id(nemo_exact):
    ids = nemo_exact.generate([DIALOG], max_new_tokens=12)
    assert ids[0, -12:].tolist() == RECORDED["answer_with_pad_ids_masked"]
    (response,) = [a for r in nemo_exact.generate_each([DIALOG], max_new_tokens=12) for a in r]
    assert response.ids.tolist() == RECORDED["answer_with_pad_ids_masked"]
    ends = sum(m and i == END for m, i in zip(RECORDED["mask"], RECORDED["training"], strict=True))
    assert losses_of(nemo_exact).loss.count == sum(RECORDED["mask"]) - ends


def test_a_pad_token_that_opens_prompts_is_kept(model):
    rows = np.array([[END, 350, 292], [END, END, 292]], np.int32)

    def tokens_of(rows, bos_id):
        context = PromptContext(
            formatter=model.prompt_formatter,
            sample_rate_hz=16000,
            placeholder_id=model.audio_locator_tag_id,
            pad_id=END,
            bos_id=bos_id,
            vocab_size=model.text_vocab_size,
        )
        return [e.tokens.tolist() for e in prompt_examples(rows, None, None, context)[0]]

    assert tokens_of(rows, END) == [[END, 350, 292], [END, 292]]
    assert tokens_of(rows, 1) == [[350, 292], [292]]
    assert tokens_of(np.array([[END, 292], [350, 292]]), END) == [[292], [350, 292]]


def test_a_tokenizer_without_pad_and_unk_is_warned_of_once(tmp_path, caplog):
    folder = shutil.copytree(DATA / "llm" / "llama", tmp_path / "no_pad")
    path = folder / "tokenizer_config.json"
    made = json.loads(path.read_text())
    del made["unk_token"]
    path.write_text(json.dumps(made))
    path = folder / "tokenizer.json"
    made = json.loads(path.read_text())
    made["model"].pop("unk_token", None)
    path.write_text(json.dumps(made))
    tokenizer = Tokenizer(folder)
    with caplog.at_level(logging.WARNING):
        assert tokenizer.pad_id == tokenizer.pad_id == 0
    assert [r.getMessage() for r in caplog.records if "neither a pad token" in r.getMessage()] == [
        f"tokenizer {folder}: it has neither a pad token nor an unk token, so the token of id 0 "
        "pads; set pad_token in its tokenizer_config.json if that token occurs in texts"
    ]
