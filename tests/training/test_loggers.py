"""TensorBoard and W&B behind exp_manager's keys, and sample hypotheses of validation."""

import json
import sys
from types import ModuleType, SimpleNamespace

import pytest

from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.exp_manager import SummaryWriterParams
from speechlm2_jax.training.protocol import Sample, Scored
from speechlm2_jax.training.run.metrics_log import MetricsLog, wandb_arguments
from speechlm2_jax.training.validation import choose_samples
from tests.training.toy import ToyData, ToyModel, make_trainer


class Wandb(ModuleType):
    """Stands in for the package: keeps what it is told."""

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = SimpleNamespace()
        self.opened, self.rows = [], []
        self.errors = SimpleNamespace(Error=RuntimeError)
        self.Table = lambda columns, data: {"columns": columns, "data": data}

    def init(self, *, dir, config, id="new", project=None, mode=None, resume=None):
        self.opened.append({"id": id, "project": project, "mode": mode, "resume": resume})
        self.config = config
        log = lambda values, step: self.rows.append((step, values))  # noqa: E731
        return SimpleNamespace(id=id, log=log, finish=lambda: self.rows.append("finished"))


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def scored(batch):
    samples = tuple(Sample(id=i, reference="one|two", hypothesis="one too") for i in batch.ids)
    return Scored(total=1.0, count=4.0, samples=samples)


def fit(run_dir, max_steps=3, experiment=None, **options):
    model = ToyModel(dropout=0.2, validation_metrics={"wer": scored})
    trainer = make_trainer(run_dir, max_steps=max_steps, experiment=experiment, **options)
    return trainer.fit(model, ToyData())


def test_wandb_gets_every_row_and_the_settings_and_goes_on_in_the_same_run(tmp_path, wandb):
    kwargs = {"name": None, "project": "p", "offline": True}
    experiment = {"create_wandb_logger": True, "wandb_logger_kwargs": {**kwargs, "id": "mine"}}
    experiment["wandb_logger_kwargs"].pop("name")
    fit(tmp_path, experiment=experiment)
    assert wandb.opened == [{"id": "mine", "project": "p", "mode": "offline", "resume": None}]
    assert wandb.config["trainer"]["max_steps"] == 3
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    numbers = [(r.pop("step"), {k: v for k, v in r.items() if v is not None}) for r in rows]
    told = [row for row in wandb.rows if row != "finished" and "val_samples/clean" not in row[1]]
    assert [row for row in told if "val_samples/noisy" not in row[1]] == numbers
    assert wandb.rows[-1] == "finished"
    del experiment["wandb_logger_kwargs"]["id"]
    fit(tmp_path, max_steps=4, experiment=experiment)
    assert wandb.opened[1] == {"id": "mine", "project": "p", "mode": "offline", "resume": "allow"}


def test_lightnings_arguments_of_wandb_are_translated_or_refused_by_name():
    given = {"offline": True, "save_dir": "x", "version": "v", "project": "p", "log_model": False}
    expected = {"mode": "offline", "dir": "x", "id": "v", "project": "p"}
    assert wandb_arguments(given) == expected
    with pytest.raises(SettingsError, match="wandb_logger_kwargs.log_model: checkpoints lie"):
        wandb_arguments({"log_model": "all"})


def test_an_argument_that_wandb_refuses_is_one_clear_error(tmp_path, wandb):
    experiment = {"create_wandb_logger": True, "wandb_logger_kwargs": {"projekt": "p"}}
    with pytest.raises(SettingsError, match="exp_manager.wandb_logger_kwargs: .*projekt"):
        fit(tmp_path, experiment=experiment)


def test_tensorboard_takes_the_writers_options_and_opens_with_the_first_row(tmp_path):
    options = SummaryWriterParams(sub_dir="mine", filename_suffix=".me", flush_secs=5)
    folder = options.folder(tmp_path)
    rows = MetricsLog(None, tensorboard=folder, writer_options=options.options())
    assert not folder.exists()
    rows.write({"step": 1, "loss": 0.5})
    rows.write_samples(1, {"a": [Sample(id="u", reference="r|s", hypothesis="h")]})
    rows.close()
    (events,) = folder.iterdir()
    assert events.parent == tmp_path / "tensorboard" / "mine" and events.name.endswith(".me")
    content = events.read_bytes()
    assert b"loss" in content and b"val_samples/a" in content and b"r\\|s" in content
    with pytest.raises(SettingsError, match="summary_writer_kwargs.log_dir.*explicit_log_dir"):
        make_trainer(tmp_path / "run", experiment={"summary_writer_kwargs": {"log_dir": "x"}})


def test_validation_shows_the_same_few_hypotheses_of_each_set_every_time(tmp_path, capsys):
    fit(tmp_path, max_steps=6, num_val_samples=2)
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split("  ") for line in lines if "b" in line and line.count("  ") == 2]
    shown = [words for words in shown if words[2].startswith("b")]
    by_step = {}
    for step, name, sample_id in shown:
        by_step.setdefault(step, []).append((name, sample_id))
    assert list(by_step) == ["step 3", "step 6"] and by_step["step 3"] == by_step["step 6"]
    assert [name for name, _ in by_step["step 3"]] == ["clean", "clean", "noisy", "noisy"]
    at = lines.index("    reference:  one|two")
    assert lines[at + 1] == "    hypothesis: one too"
    assert "hypothesis: one too" in (tmp_path / "train.log").read_text()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3])["val_wer"] == 0.25


def test_samples_are_chosen_by_their_ids_whatever_their_order():
    samples = [Sample(id=str(i), reference="", hypothesis="") for i in range(50)]
    assert choose_samples(samples, 3) == choose_samples(samples[::-1], 3)
    assert choose_samples(samples, 3) != samples[:3] and choose_samples(samples, 0) == []
