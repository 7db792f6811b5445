"""Perplexity of references: that of validation, per response, on one device or several.

The first three tests compile: a validation, and the forward pass of each shape.
"""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

import speechlm2_jax as slm
from speechlm2_jax import validation_scores
from speechlm2_jax.batches import LossSum
from speechlm2_jax.commands import evaluate
from speechlm2_jax.evaluation import run as evaluation_run
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.generate import GeneratedRound
from speechlm2_jax.evaluation.inputs import read_inputs
from speechlm2_jax.evaluation.metrics.resampling import estimate
from speechlm2_jax.evaluation.metrics.task_metrics import PERPLEXITY, TASK_METRICS, Pair
from speechlm2_jax.evaluation.perplexity import losses_of_references
from speechlm2_jax.evaluation.run import make_prompt
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.validation import Validator, perplexity
from tests.evaluation.run_case import evaluate_on_one_device
from tests.training.toy import make_batch

DATA = Path(__file__).parents[1] / "data" / "salm"
MODEL, AUDIO = DATA / "llama_adapter_hf", DATA / "audio"
RTOL = 1e-5
"""fp32: batches of other shapes add in another order."""


def turn(role, value):
    kind = "audio" if str(value).endswith(".wav") else "text"
    place = {"duration": 0.4} if kind == "audio" else {}
    return {"from": role, "type": kind, "value": str(value), **place}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A manifest of recordings, and one of conversations with two responses."""
    folder = tmp_path_factory.mktemp("sets")
    a0, a1 = AUDIO / "a0.wav", AUDIO / "a1.wav"
    texts = ("three words here", "one", "a longer text of several words")
    rows = [
        {"id": str(n), "audio_filepath": str(path), "duration": seconds, "text": text}
        for n, (path, seconds, text) in enumerate(
            zip((a0, a1, a1), (0.45, 0.32, 0.32), texts, strict=True)
        )
    ]
    turns = [turn("User", a0), turn("Assistant", "yes"), turn("User", a1), turn("Assistant", "no")]
    dialogs = [{"id": "d", "conversations": turns}]
    for name, lines in (("clips", rows), ("dialogs", dialogs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture(scope="module")
def model():
    return slm.models.SALM.from_pretrained(MODEL, dtype="float32")


def validated(model, folder):
    """The metrics of a validation of both sets."""
    kinds = {"clips": "lhotse_as_conversation", "dialogs": "multimodal_conversation"}
    sets = {
        name: {
            "sample_rate": 16_000,
            "prompt_format": "llama2",
            "token_equivalent_duration": 0.08,
            "batch_size": 3,
            "input_cfg": [
                {
                    "type": kind,
                    "manifest_filepath": str(folder / f"{name}.jsonl"),
                    "audio_locator_tag": model.audio_locator_tag,
                    "tags": {"context": "Say:"},
                }
            ],
        }
        for name, kind in kinds.items()
    }
    data = slm.data.DataModule(
        {"validation_ds": {"datasets": sets}, "train_ds": sets["clips"]}, tokenizer=model.tokenizer
    )
    trainer = slm.Trainer(
        devices=1, precision="32-true", validation_metrics=[PERPLEXITY], accelerator="cpu"
    )
    return trainer.validate(model, data)


def losses(model, path, **options):
    """Of each reference of a manifest, with the prompt of `validated`."""
    config = EvalConfig(pretrained_name="", inputs="", user_prompt="Say:")
    options = {"batch_size": 3, "max_s": None, "is_joint": False, **options}
    prompt = make_prompt(model, config)
    inputs = read_inputs(path, {"context": "Say:"})
    return losses_of_references(model, inputs, prompt, **options)


def of_set(found):
    return math.exp(sum(one.nll for one in found) / sum(one.tokens for one in found))


def test_it_is_the_exponential_of_the_validation_loss(model, sets):
    """A target that is one position off, or another mask, changes it by far more than RTOL."""
    expected = validated(model, sets)
    for name in ("clips", "dialogs"):
        found = of_set(losses(model, sets / f"{name}.jsonl"))
        assert found == pytest.approx(math.exp(expected[f"val_loss_{name}"]), rel=RTOL)
        assert expected[f"val_perplexity_{name}"] == pytest.approx(found, rel=RTOL)


def test_the_loss_of_a_response_depends_on_no_other_and_on_no_device(model, sets):
    path = sets / "clips.jsonl"
    together = losses(model, path)
    lines = path.read_text().splitlines(keepends=True)
    path.with_name("others.jsonl").write_text(lines[0] * 2 + lines[2])
    first = losses(model, path.with_name("others.jsonl"))[0]
    assert together[0].tokens == first.tokens < together[2].tokens
    assert together[0].nll == pytest.approx(first.nll, rel=RTOL)
    assert together[1].nll != pytest.approx(together[2].nll, rel=0.1)
    sharded = slm.models.SALM.from_pretrained(
        MODEL, dtype="float32", strategy="auto", devices=jax.devices()[:2]
    )
    for one, other in zip(together, losses(sharded, path), strict=True):
        assert (one.tokens, pytest.approx(one.nll, rel=RTOL)) == (other.tokens, other.nll)


def test_what_cannot_be_scored_has_no_loss(model, tmp_path):
    a0 = {"audio_filepath": str(AUDIO / "a0.wav"), "duration": 0.45}
    rows = [{**a0, "text": "a"}, {**a0, "audio_filepath": "missing.wav", "text": "a"}, a0]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert losses(model, tmp_path / "m.jsonl", max_s=0.4) == [None] * 3


def test_evaluate_writes_losses_and_compares_them(model, sets, tmp_path, monkeypatch, capsys):
    def silent(_, clips, task):
        """Generation is tested elsewhere."""
        outputs = [(clip, np.asarray(task.stop_ids[:1])) for clip in clips]
        yield GeneratedRound(outputs=outputs, audio_s=1.0, seconds=1.0, compiled=0)

    monkeypatch.setattr(evaluation_run, "generate_clips", silent)
    output = tmp_path / "out.jsonl"
    argv = [f"pretrained_name={MODEL}", f"inputs={sets / 'clips.jsonl'}", "dtype=float32"]
    argv += [f"output_manifest={output}", "user_prompt=Say:", "metrics=[wer,perplexity]"]
    try:
        assert evaluate_on_one_device([*argv, "batch_size=3", "device=cpu"]) == 0
    finally:
        jax.config.update("jax_default_device", None)
    *rows, record = map(json.loads, output.read_text().splitlines())
    expected = losses(model, sets / "clips.jsonl")
    assert [row["tokens"] for row in rows] == [one.tokens for one in expected]
    assert [row["nll"] for row in rows] == pytest.approx([one.nll for one in expected], rel=RTOL)
    found = record["provenance"]["totals"]["metrics"][PERPLEXITY]
    assert found["value"] == pytest.approx(of_set(expected), rel=RTOL)
    assert found["low"] < found["value"] < found["high"]
    out = capsys.readouterr().out
    assert "\nperplexity  " in out and "leaves out" not in out

    worse, other, without = (tmp_path / name for name in ("worse", "other", "without"))
    write(worse, [{**row, "nll": 2 * row["nll"]} for row in rows])
    write(other, [{**row, "tokens": row["tokens"] + 1} for row in rows])
    write(without, [{k: v for k, v in row.items() if k != "tokens"} for row in rows])
    compare = ["--metrics", PERPLEXITY, "--compare", str(output)]
    assert evaluate.main([*compare, str(worse)]) == 0
    out = capsys.readouterr().out
    assert f"  first   {found['value']:.2f} (95 %" in out
    assert f"  second  {found['value'] ** 2:.2f} (95 %" in out
    for path, told in ((other, "only with one tokenizer"), (without, "without has no nll")):
        assert evaluate.main([*compare, str(path)]) == 2
        assert told in capsys.readouterr().err


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_mean_is_over_tokens_in_validation_too():
    sums = iter([LossSum(total=2.0, count=4.0), LossSum(total=6.0, count=1.0)])
    validator = Validator(host_metrics={}, nemo_exact=True, has_perplexity=True)
    batches = [make_batch(n, groups=1) for n in range(2)]
    found = validator.run({"a": batches}, lambda _: {"loss": next(sums)}).metrics
    assert found["val_loss_a"] == (0.5 + 6.0) / 2
    assert found["val_perplexity_a"] == found["val_perplexity"] == math.exp(8 / 5)
    assert perplexity(1e6) == math.inf and perplexity(None) is None


def test_only_a_model_of_tokens_has_a_perplexity():
    scores = validation_scores.validation_scores
    ctc, salm = (object.__new__(kind) for kind in (slm.models.CTCModel, slm.models.SALM))
    with pytest.raises(SettingsError, match="trainer.validation_metrics: perplexity is of the tok"):
        scores(ctc, (PERPLEXITY,))
    assert scores(salm, (PERPLEXITY,)) == ({}, None), "the validator makes it of the loss"
    assert list(scores(salm, ("wer", PERPLEXITY))[0]) == ["wer"]


def test_resampling_weighs_responses_by_their_tokens():
    pairs = [Pair("", "", nll=3.0, tokens=3), Pair("", "", nll=10.0, tokens=5), Pair("a", "b")]
    assert estimate(TASK_METRICS[PERPLEXITY], pairs, "none").value == pytest.approx(
        math.exp(13 / 8)
    )
    assert estimate(TASK_METRICS[PERPLEXITY], pairs[2:], "none").value is None
