"""train.py's own path for a duplex speech-to-text model, with NeMo's keys, from YAML to scores."""

import json

import pytest
import yaml

from speechlm2_jax import experiment
from speechlm2_jax.models import DuplexSTTModel
from speechlm2_jax.settings import SettingsError
from tests.data_pipeline import duplex_corpus as corpus
from tests.parity.duplex_golden import DATA
from tests.parity.stt_golden import settings

PARTS = ("pretrained_llm", "pretrained_asr")


def cut(folder, name, custom):
    """A cut without the agent's recording."""
    made = corpus.cut(folder, name, 0.8)
    made.custom = custom
    return made


@pytest.fixture(scope="module")
def yaml_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stt")
    prompts = [{"system_prompt": "the weather"}, {"system_prompt": "hi"}, {}, {"task": "asr"}]
    cuts = [cut(folder, f"c{n}", custom) for n, custom in enumerate(prompts)]
    source = corpus.write_cuts(folder / "cuts.jsonl", cuts)
    model = settings(predict_user_text=True, token_loss_weight={"bos": 2.0}, scoring_asr="some")
    block = {key: value for key, value in corpus.BLOCK.items() if key != "target_sample_rate"}
    stream = {**source, "sample_rate": 16000, "batch_size": 2, "seed": 1}
    values = {
        "model": {**model, **{key: str(DATA / model[key]) for key in PARTS}},
        "trainer": {
            "max_steps": 2,
            "val_check_interval": 2,
            "precision": "32-true",
            "devices": 1,
            "accelerator": "cpu",
            "num_sanity_val_steps": 0,
        },
        "data": {
            **block,
            "train_ds": {**stream, "shuffle": True},
            "validation_ds": {"datasets": {"val": source}, "sample_rate": 16000, "batch_size": 4},
        },
        "exp_manager": {"explicit_log_dir": str(folder / "run")},
    }
    path = folder / "duplex_stt.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_yaml_of_nemo_trains_scores_and_loads(yaml_file):
    built = experiment.build(yaml_file)
    assert isinstance(built.model, DuplexSTTModel)
    built.fit()
    run = yaml_file.parent / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = {key: value for row in rows for key, value in row.items()}
    assert last["user_text_loss"] > 0
    scores = ("val_loss", "val_txt_bleu", "val_src_wer", "val_src_txt_bleu", "val_turn_taking_acc")
    assert not [name for name in scores if name not in last]
    assert DuplexSTTModel.from_pretrained(run).predict_user_text


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("+model.text_to_text_loss_weight=0.1", "texts without audio"),
        ("+data.early_interruption_prob=0.5", "interrupted turns"),
        ("+model.predict_user_txt=true", "predict_user_text"),
        ("data.frame_length=0.04", "does not fit the model"),
    ],
)
def test_keys_without_meaning_are_refused(yaml_file, override, reason):
    with pytest.raises(SettingsError, match=reason):
        experiment.build(yaml_file, [override])
