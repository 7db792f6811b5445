"""`slm.Trainer` scores hypotheses at validation as train.py does."""

import json
from types import SimpleNamespace

import pytest
import yaml

import speechlm2_jax as slm
from speechlm2_jax import validation_scores
from speechlm2_jax.training.protocol import Sample, Scored
from tests.training.tiny_salm import write_config
from tests.training.toy import ToyData, ToyModel


@pytest.mark.slow  # compiles generation
def test_fit_scores_words_and_shows_hypotheses(tmp_path, capsys):
    trainer = {"max_steps": 1, "num_val_samples": 1, "precision": "32-true"}
    values = yaml.safe_load(write_config(tmp_path, trainer=trainer).read_text())
    model = slm.models.SALM(values["model"])
    data = slm.data.DataModule(values["data"], tokenizer=model.tokenizer)
    result = slm.Trainer(**values["trainer"]).fit(model, data)
    assert result.metrics["val_wer_same"] == result.metrics["val_wer"] > 0
    assert "hypothesis:" in capsys.readouterr().out
    losses = slm.Trainer(**values["trainer"]).validate(model, data, validation_metrics={})
    assert "val_loss" in losses and "val_wer" not in losses


def test_scores_are_of_whole_sets_and_of_all_processes(monkeypatch):
    responses = {"a b": "a c", "d": "d", "e f": "e f"}
    monkeypatch.setattr(validation_scores, "hypotheses", lambda _, p: [responses[t] for t in p])
    scores = validation_scores.ResponseScores(model=object(), names=("wer", "cer", "chrf"))
    for name, texts in (("one", ["a b", "d"]), ("two", ["e f"]), ("none", [])):
        batch = [SimpleNamespace(id=text, text=text, prompt=text) for text in texts]
        samples = scores.update(name, SimpleNamespace(references=(*batch, None)))
        assert [(s.reference, s.hypothesis) for s in samples] == [(t, responses[t]) for t in texts]
    found = scores.compute()
    assert (found["wer_one"], found["wer_two"]) == (pytest.approx(1 / 3), 0)
    assert found["wer"] == pytest.approx(1 / 6) and found["cer_one"] == 0.25
    assert "wer_none" not in found and found["chrf_two"] == 100
    gathered = [json.dumps(scores.pairs), json.dumps({"two": [["g", "h"]]})]
    monkeypatch.setattr(validation_scores.processes, "gather_texts", lambda _: gathered)
    scores.gather()  # this is the first process
    assert scores.compute()["wer_two"] == pytest.approx(1 / 3)


@pytest.mark.slow  # builds and validates a model twice
def test_metrics_of_responses_are_those_that_are_named(tmp_path, capsys):
    trainer = {"max_steps": 1, "num_val_samples": 1, "validation_metrics": ["cer", "wer", "chrf"]}
    values = yaml.safe_load(write_config(tmp_path, trainer=trainer).read_text())
    model = slm.models.SALM(values["model"])
    data = slm.data.DataModule(values["data"], tokenizer=model.tokenizer)
    alone = slm.Trainer(**{**values["trainer"], "validation_metrics": ["wer"]})
    expected = alone.validate(model, data)
    found = slm.Trainer(**values["trainer"]).validate(model, data)
    assert found["val_wer_same"] == pytest.approx(expected["val_wer_same"], rel=1e-6)
    assert found["val_cer"] > 0 and 0 <= found["val_chrf"] <= 100
    assert "hypothesis:" in capsys.readouterr().out
    with pytest.raises(ValueError, match="trainer.validation_metrics: 'were' is unknown"):
        slm.Trainer(**{**values["trainer"], "validation_metrics": ["were"]}).validate(model, data)


def test_scores_of_a_model_are_those_that_train_takes(monkeypatch, capsys):
    sample = Sample(id="a", reference="yes", hypothesis="no")
    score = lambda batch: Scored(total=1.0, count=2.0, samples=(sample,))  # noqa: E731
    monkeypatch.setattr(validation_scores, "validation_scores", lambda *_: ({"wer": score}, None))
    trainer = slm.Trainer(
        max_steps=1, num_sanity_val_steps=0, devices=1, compilation_cache_dir=None
    )
    assert trainer.fit(ToyModel(), ToyData()).metrics["val_wer"] == 0.5
    assert "hypothesis: no" in capsys.readouterr().out


def test_another_kind_of_model_has_its_own_metrics_alone():
    assert validation_scores.validation_scores(ToyModel()) == ({}, None)
