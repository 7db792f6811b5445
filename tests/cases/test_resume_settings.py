"""Resuming with other settings: what is taken is listed, what changes the weights is refused."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

import speechlm2_jax as slm
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.data.tokenizer_contents import contents_of_files
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.changed_settings import (
    Change,
    changes_of,
    check_resumed,
    is_other_model,
)
from tests.training.tiny_salm import LLAMA, write_config
from tests.training.toy import ToyData, ToyModel, make_trainer, rows_of

PREFIX = "changed since the checkpoint: "


def fit(run_dir, max_steps=2, *, model=None, data=None, experiment=None):
    trainer = make_trainer(run_dir, max_steps=max_steps, experiment=experiment)
    return trainer.fit(model or ToyModel(), data or ToyData())


def listed(capsys):
    lines = capsys.readouterr().out.splitlines()
    return sorted(line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX))


def test_changes_of_optimizer_data_and_trainer_are_taken_and_listed(tmp_path, capsys):
    fit(tmp_path)
    other = ToyModel(settings={**ToyModel().settings, "optimizer": {"lr": 1e-3}})
    data = ToyData(settings={"train_ds": {"batch_size": 4}})
    assert fit(tmp_path, 4, model=other, data=data).step == 4
    assert listed(capsys) == [
        "data.train_ds.batch_size: 2 -> 4",
        "model.optimizer.lr: not set -> 0.001",
        "trainer.max_steps: 2 -> 4",
    ]


def test_another_model_in_an_old_run_directory_is_refused_unless_asked_for(tmp_path, capsys):
    fit(tmp_path)
    config = (tmp_path / "config.yaml").read_text()
    other = {**ToyModel().settings, "unknown_key": 1}
    message = rf"{tmp_path}/checkpoints/2 .*: model\.unknown_key: not set -> 1\. Use .*=true$"
    with pytest.raises(SettingsError, match=message):
        fit(tmp_path, 4, model=ToyModel(settings=other))
    assert (tmp_path / "config.yaml").read_text() == config
    assert max(rows_of(tmp_path)[0]) == 2
    allowed = {"resume_allow_changes": True}
    assert fit(tmp_path, 4, model=ToyModel(settings=other), experiment=allowed).step == 4
    assert "model.unknown_key: not set -> 1" in listed(capsys)


def test_other_variables_are_one_line_that_names_the_directory(tmp_path):
    fit(tmp_path)
    trainable = {**ToyModel().trainable, "layers.bias": False}
    with pytest.raises(SettingsError, match=rf"{tmp_path}.*layers\.bias is not in the model"):
        fit(tmp_path, 4, model=ToyModel(trainable=trainable))


@pytest.mark.parametrize(
    ("key", "is_refused"),
    [
        ("model.optimizer.lr", False),
        ("model.lr_scheduler.min_lr", False),
        ("model.perception.spec_augment.time_masks", False),
        ("model.perception.encoder.dropout_att", False),
        ("model.encoder.dropout", False),
        ("model.perception.preprocessor.dither", False),
        ("model.lora.lora_dropout", False),
        ("model.optimizer_of_another_kind", True),
        ("model.perception.encoder.xscaling", True),
        ("model.perception.preprocessor.normalize", True),
        ("model.prompt_format", True),
        ("model.audio_locator_tag", True),
        ("model.tokenizer_path", True),
        ("model.pretrained_llm", True),
        ("model.lora.lora_alpha", True),
        ("model.llm.rope.theta", True),
        ("data.train_ds.prompt_format", True),
        ("data.train_ds.input_cfg.0.audio_locator_tag", True),
        ("data.target_sample_rate", True),
        ("data.validation_ds.datasets.a.batch_size", False),
        ("data.train_ds.input_cfg.0.manifest_filepath", False),
        ("trainer.precision", False),
        ("exp_manager.checkpoint_callback_params.save_top_k", False),
    ],
)
def test_the_table_decides_what_a_change_means(key, is_refused):
    assert Change(key=key, before=1, after=2).is_refused is is_refused


def test_a_value_written_another_way_is_no_change(tmp_path):
    folder = tmp_path / "llm"
    folder.mkdir()
    before = {"a": 1, "path": str(folder), "b": None, "c": {}, "d": [1, {"e": 2}]}
    after = {"a": 1.0, "path": f"{tmp_path}/./llm", "d": (1, {"e": 2}), "f": None}
    assert list(changes_of(before, after, "x")) == []
    found = changes_of({"d": [1, {"e": 2}]}, {"d": [1, {"e": 3}, 4]}, "x")
    assert [str(change) for change in found] == ["x.d.1.e: 2 -> 3", "x.d.2: not set -> 4"]


@pytest.fixture(scope="module")
def run_of_salm(tmp_path_factory):
    """A SALM, its `model:` block, and the run directory of a checkpoint of it."""
    folder = tmp_path_factory.mktemp("salm")
    values = yaml.safe_load(write_config(folder, trainer={"max_steps": 1}).read_text())
    model = slm.models.SALM(values["model"])
    return folder, values, model


def resumed_salm(run_of_salm, tmp_path, monkeypatch, after, definitions=None):
    """Compares the run's settings, as its checkpoint has them, with those of another model."""
    _, values, model = run_of_salm
    (tmp_path / "checkpoints" / "1" / "progress").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    model.save_definition(tmp_path / "model")
    if definitions is not None:
        path = tmp_path / "model" / "llm_backbone" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | definitions))
    read = lambda step, name: json.loads(json.dumps(model.settings))  # noqa: E731
    monkeypatch.setattr("speechlm2_jax.checkpointing.read_item", read)
    other = slm.models.SALM({**values["model"], **after})
    check_resumed([tmp_path / "checkpoints"], other, values, allows_changes=False)


def test_settings_of_a_model_are_compared_with_their_defaults(run_of_salm, tmp_path, monkeypatch):
    lora = {
        **run_of_salm[1]["model"]["lora"],
        "lora_alpha": 8,
        "use_rslora": False,
        "peft_type": "LORA",
    }
    resumed_salm(
        run_of_salm, tmp_path, monkeypatch, {"lora": lora, "encoder_chunk_size_seconds": None}
    )


@pytest.mark.parametrize(
    ("after", "definitions", "named"),
    [
        (
            {"lora": {"r": 2, "lora_dropout": 0.2, "lora_alpha": 16}},
            None,
            r"model\.lora\.lora_alpha",
        ),
        ({"audio_locator_tag": "<a>"}, None, r"model\.audio_locator_tag: .* -> <a>"),
        (
            {},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
            r"model\.llm\.\S*theta: 77\.0 -> ",
        ),
    ],
)
def test_what_the_weights_mean_is_compared_inside_the_parts(
    run_of_salm, tmp_path, monkeypatch, after, definitions, named
):
    with pytest.raises(SettingsError, match=named):
        resumed_salm(run_of_salm, tmp_path, monkeypatch, after, definitions)


class Tokenized(ToyModel):
    """A toy with a tokenizer in a folder."""

    def __init__(self, folder):
        super().__init__()
        self.tokenizer = Tokenizer(folder)


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(LLAMA, tmp_path / "llm"))


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values, indent=1, sort_keys=True))


def swap_two(values):
    vocab = values["model"]["vocab"]
    first, second = list(vocab)[-2:]
    vocab[first], vocab[second] = vocab[second], vocab[first]


def test_a_tokenizer_edited_behind_the_same_path_is_refused(folder, tmp_path, capsys):
    run = tmp_path / "run"
    fit(run, model=Tokenized(folder))
    assert fit(run, 3, model=Tokenized(folder)).step == 3
    edit(folder / "tokenizer.json", swap_two)
    message = rf"model\.tokenizer \({folder}\): files of checksum \w+ -> files of checksum \w+\. "
    with pytest.raises(SettingsError, match=message):
        fit(run, 4, model=Tokenized(folder))
    allowed = {"resume_allow_changes": True}
    assert fit(run, 4, model=Tokenized(folder), experiment=allowed).step == 4
    assert any(line.startswith("model.tokenizer (") for line in listed(capsys))
    assert fit(run, 5, model=Tokenized(folder)).step == 5  # its tokenizer by now


def test_a_run_that_does_not_know_its_tokenizer_is_resumed(folder, tmp_path):
    """One of an older version, or one whose list is damaged, which its readers tell."""
    run = tmp_path / "run"
    fit(run, model=Tokenized(folder))
    edit(folder / "tokenizer.json", swap_two)
    (run / "model" / "checksums.xxh3").write_text("damaged")
    assert fit(run, 3, model=Tokenized(folder)).step == 3


EDITS = {
    "layout": ("tokenizer.json", lambda values: None, False),
    "decoder": ("tokenizer.json", lambda v: v.update(decoder=None, post_processor=None), False),
    "version": ("tokenizer.json", lambda v: v.update(version="2.0"), False),
    "chat template": ("tokenizer_config.json", lambda v: v.update(chat_template="x"), False),
    "two ids": ("tokenizer.json", swap_two, True),
    "normalizer": ("tokenizer.json", lambda v: v.update(normalizer={"type": "NFKC"}), True),
    "pad token": ("tokenizer_config.json", lambda v: v.update(pad_token="<pad2>"), True),
}


@pytest.mark.parametrize("name", EDITS)
def test_only_what_decides_ids_changes_the_checksum_of_a_tokenizer(folder, name):
    before = contents_of_files(folder)
    assert before is not None
    file, change, is_other = EDITS[name]
    edit(folder / file, change)
    assert (contents_of_files(folder) != before) is is_other


def test_merges_may_be_written_in_either_way(tmp_path):
    merges = [["a", "b"], ["ab", "c"]]
    found = []
    for written in (merges, [" ".join(pair) for pair in merges], merges[::-1]):
        model = {"type": "BPE", "vocab": {"a": 0}, "merges": written}
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
        found.append(contents_of_files(tmp_path))
    assert found[0] == found[1] != found[2]


def test_other_files_of_a_tokenizer_count_where_they_are_read(tmp_path):
    assert contents_of_files(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert contents_of_files(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    first = contents_of_files(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"other pieces")
    assert None is not first != contents_of_files(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")  # damaged: by its bytes
    assert contents_of_files(tmp_path) is not None


def test_a_finished_run_of_another_model_is_none(tmp_path):
    (tmp_path / "config.yaml").write_text("model: {width: 8, optimizer: {lr: 1}}\n")
    assert not is_other_model(tmp_path, {"model": {"width": 8, "optimizer": {"lr": 2}}})
    assert is_other_model(tmp_path, {"model": {"width": 9}})
    assert not is_other_model(tmp_path / "new", {"model": {"width": 9}})
