"""Saved models carry a card for the hub: base models, metrics and data of the run, licence."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import speechlm2_jax as slm
from speechlm2_jax.pretrained.licences import front_matter, licence_of
from speechlm2_jax.pretrained.model_card import CardInput, model_card
from speechlm2_jax.pretrained.run_facts import RunFacts, read_run_facts

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(DATA / "salm")
        return slm.models.SALM.from_pretrained("qwen3_lora_hf")


def parsed(text: str) -> tuple[dict, str]:
    """The front matter, and the page."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def card_of(model, **names: str) -> tuple[dict, str]:
    """The card of a model whose components have these names."""
    blueprint = model._blueprint
    blueprint = replace(blueprint, named={**blueprint.named, **names})
    return parsed(
        model_card(CardInput(blueprint=blueprint, variables=model.variables, dtype="bfloat16"))
    )


def run_directory(folder: Path) -> Path:
    """A run with two checkpoints, of which the first is the best."""
    for step in (10, 20):
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    rows = [
        {"step": 10, "loss": 1.0},
        {"step": 10, "val_loss": 0.5, "val_wer": 0.25, "val_none": None},
        {"step": 20, "loss": 0.1},
        {"step": 20, "val_loss": 0.125},
    ]
    lines = [json.dumps(row) for row in rows] + ['{"step": 2']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    sources = [
        {"type": "nemo", "manifest_filepath": ["/data/secret/train.jsonl", "/data/b.jsonl"]},
        {"type": "group", "input_cfg": [{"cuts_path": "more/cuts.jsonl.gz"}]},
    ]
    settings = {"data": {"train_ds": {"input_cfg": sources}}, "model": {"pretrained_llm": "x"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    totals = {"wer": 0.0789, "audio_is_swapped": False}
    block = {"model": {"step": 20}, "inputs": "corpus/test.jsonl", "totals": totals}
    text = json.dumps({"id": "a"}) + "\n" + json.dumps({"provenance": block}) + "\n"
    (folder / "answers.jsonl").write_text(text)
    return folder


def test_front_matter_names_base_models_task_and_common_licence(model):
    head, body = card_of(
        model, pretrained_llm="nvidia/canary-qwen-2.5b", pretrained_asr="nvidia/canary-1b-flash"
    )
    assert head["base_model"] == ["nvidia/canary-qwen-2.5b", "nvidia/canary-1b-flash"]
    assert head["license"] == "cc-by-4.0"
    assert head["pipeline_tag"] == "automatic-speech-recognition"
    assert "SALM.from_pretrained" in body and "nemo.collections.speechlm2" in body


def test_licences_that_differ_are_listed_and_not_claimed(model):
    head, body = card_of(
        model, pretrained_llm="Qwen/Qwen3-1.7B", pretrained_asr="/home/me/private/encoder.nemo"
    )
    assert "license" not in head and head["base_model"] == ["Qwen/Qwen3-1.7B"]
    assert "LLM Qwen/Qwen3-1.7B: apache-2.0" in body
    assert "encoder.nemo: unknown" in body and "/home" not in body


def test_a_saved_directory_has_the_card_with_its_lora_and_dtype(model, tmp_path):
    model.save_pretrained(tmp_path / "a", merge_lora=True, dtype="bfloat16")
    _, body = parsed((tmp_path / "a/README.md").read_text())
    assert "r 4, alpha 8, on q_proj, v_proj; merged into the weights" in body
    assert "| dtype | bfloat16 |" in body and "| prompt format | qwen |" in body
    count = sum(x.size for p, x in model.variables.items() if "lora" not in p)
    assert f"| parameters | {count:,} |" in body
    model.save_llm(tmp_path / "b")
    head, body = parsed((tmp_path / "b/README.md").read_text())
    assert head["library_name"] == "transformers" and "AutoModelForCausalLM" in body


def test_a_run_gives_its_step_metrics_data_and_word_error_rate(tmp_path, monkeypatch):
    from speechlm2_jax.pretrained import run_facts

    run = run_directory(tmp_path)
    steps = {"step": run / "checkpoints/20"}
    monkeypatch.setattr(run_facts.checkpointing, "intact_step", lambda path: steps["step"])
    assert read_run_facts(run) == RunFacts(
        step=20,
        validation={"val_loss": 0.125},
        data=("train.jsonl", "b.jsonl", "cuts.jsonl.gz"),
        test_set="test.jsonl",
        wer=0.0789,
    )
    steps["step"] = run / "checkpoints/10"  # the evaluation was of other weights
    first = read_run_facts(run)
    assert first.validation == {"val_loss": 0.5, "val_wer": 0.25}
    assert first.wer is None


def test_the_card_of_a_run_has_a_table_and_the_hubs_index(model, tmp_path, monkeypatch):
    from speechlm2_jax.pretrained import model_card as cards

    facts = RunFacts(step=2000, validation={"val_acc": 0.9}, test_set="test.jsonl", wer=0.0789)
    monkeypatch.setattr(cards, "read_run_facts", lambda origin: facts)
    head, body = card_of(model)
    (result,) = head["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "wer", "name": "WER", "value": 7.89}]
    for row in (
        "| optimizer steps | 2,000 |",
        "| val_acc | 0.9 |",
        "| WER on test.jsonl | 7.89% |",
    ):
        assert row in body


def test_facts_of_an_earlier_card_stay(model, tmp_path, monkeypatch):
    folder = tmp_path / "given"
    shutil.copytree(DATA / "salm/qwen3_lora_hf", folder)
    text = "---\nlicense: cc-by-4.0\nlanguage: [en, de]\nlibrary_name: NeMo\n---\n# Title\n"
    (folder / "README.md").write_text(text)
    monkeypatch.chdir(DATA / "salm")
    loaded = slm.models.SALM.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "saved")
    head, body = parsed((tmp_path / "saved/README.md").read_text())
    assert head["license"] == "cc-by-4.0" and head["language"] == ["en", "de"]
    assert "This model: cc-by-4.0." in body


@pytest.mark.parametrize(
    "text", ["", "# no head", "---\nlicense: mit", "---\n- a\n---\n", "---\na: [\n---\n"]
)
def test_a_card_that_cannot_be_read_tells_nothing(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    assert front_matter(tmp_path) == {}
    assert licence_of("somebody/else", tmp_path) is None


def test_the_licence_of_a_base_model_comes_from_its_own_card_first(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert licence_of("Qwen/Qwen3-8B", tmp_path) == "mit"
    assert licence_of("Qwen/Qwen3-8B") == "apache-2.0"
