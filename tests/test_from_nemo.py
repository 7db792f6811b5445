"""Migration: every key that NeMo's users bring is told apart, accepted, and on the page."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from speechlm2_jax import experiment, settings
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.strategies import read_strategy
from speechlm2_jax.training.optimizer import read_optimizer
from speechlm2_jax.training.schedules import make_schedule

ROOT = Path(__file__).parents[1]
FACTS = ROOT / "tests" / "data" / "from_nemo"
ENCODER = {
    "_target_": "nemo.collections.asr.modules.ConformerEncoder",
    "feat_in": 128,
    "n_layers": 32,
    "d_model": 1024,
    "subsampling": "dw_striding",
    "subsampling_factor": 8,
    "n_heads": 8,
    "conv_kernel_size": 9,
}
"""What the `.nemo` file of `pretrained_asr` would bring."""


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """docs/make_from_nemo.py as a module."""
    spec = importlib.util.spec_from_file_location("page", ROOT / "docs" / "make_from_nemo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _lines(*names: str) -> list[str]:
    lines = [line for name in names for line in (FACTS / f"{name}.txt").read_text().splitlines()]
    return [line for line in lines if line]


def _config(*names: str) -> dict[str, Any]:
    """A NeMo configuration from its dotted keys, through the overrides that users type."""
    return settings.resolve(settings.override({}, [f"+{line}" for line in _lines(*names)]))


CONFIGS = [("salm",), ("salm", "salm_bucketing"), ("configs_page",)]
DUPLEX = ["s2s_duplex", "s2s_duplex_speech_decoder"]


def _sections(page: ModuleType, of: str) -> list[Any]:
    return [section for section in page.sections() if section.of in ("", of)]


def _reader(page: ModuleType, path: str, of: str) -> tuple[Any, str]:
    """The section of the page that holds a dotted key, and the key's own name."""
    block, _, key = path.rpartition(".")
    for section in _sections(page, of):
        for place in section.paths:
            pattern = re.escape(place).replace(r"\*", r"[^.]+")
            if re.fullmatch(pattern, block) and (
                key in page._TARGETS or key in [k.name for k in page.keys(section)]
            ):
                return section, key
    raise AssertionError(f"no section of docs/from_nemo.md lists {path}")


def _leaves(node: Any, path: str = "") -> list[str]:
    items: list[tuple[Any, Any]] = []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list) and node and isinstance(node[0], dict):
        items = list(enumerate(node))
    if not items:
        return [path]
    return [leaf for k, v in items for leaf in _leaves(v, f"{path}.{k}" if path else str(k))]


FREE = (r".*\.wandb_logger_kwargs\..+", r".*\.tags\..+")
"""Blocks whose keys are the user's own or another program's."""


@pytest.mark.parametrize("names", CONFIGS, ids="+".join)
def test_the_page_lists_every_key_of_nemos_configurations(page, names):
    _assert_listed(page, _leaves(_config(*names)), page.SALM)


@pytest.mark.parametrize("name", DUPLEX)
def test_the_page_lists_every_key_of_nemos_duplex_data(page, name):
    _assert_listed(page, _leaves(_config(name)["data"], "data"), page.DUPLEX)


def _assert_listed(page: ModuleType, paths: list[str], of: str) -> None:
    for path in paths:
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            prefix = ".".join(parts[:depth])
            is_item = parts[depth - 1].isdigit() or parts[depth - 2 : depth - 1] == ["datasets"]
            if not is_item and not any(re.fullmatch(free, prefix) for free in FREE):
                _reader(page, prefix, of)


def test_the_page_states_what_the_code_does(page):
    assert page.PAGE.read_text(encoding="utf-8") == page.render(), (
        "run: PYTHONPATH=. python docs/make_from_nemo.py"
    )


@pytest.mark.parametrize("names", CONFIGS, ids="+".join)
def test_nemos_configurations_are_accepted_block_by_block(page, names):
    values = _config(*names)
    perception = values["model"]["perception"]
    perception["preprocessor"] = {"features": 128, **perception.get("preprocessor", {})}
    perception["encoder"] = ENCODER | perception.get("encoder", {})
    perception["output_dim"] = 2048
    with settings.ignored_report() as ignored:
        blocks = {
            section.path: cls
            for section in _sections(page, page.SALM)
            for name, cls in section.classes.items()
            if not name and "*" not in section.path and "modality_adapter" not in section.path
        }
        for path, cls in blocks.items():
            block = _at(values, path)
            if block is not None:
                settings.build(cls, block, path)
        _build_data(page, values, page.SALM)
        if "optimizer" in values["model"]:
            optimizer = read_optimizer(values["model"]["optimizer"])
            make_schedule(values["model"]["lr_scheduler"], optimizer.lr)
        read_strategy(values["trainer"]["strategy"])
    assert "trainer.enable_checkpointing" in ignored
    assert all(reason for reason in ignored.values())


def test_a_whole_run_is_built_from_nemos_configuration(tmp_path):
    """As train.py does; only what names other people's disks and GPUs is changed."""
    data = ROOT / "tests" / "data"
    manifest = tmp_path / "a.jsonl"
    row = {"audio_filepath": str(data / "salm/audio/a0.wav"), "duration": 0.45625, "text": "yes"}
    manifest.write_text(json.dumps(row))
    lines = [line for line in _lines("salm", "salm_bucketing") if not line.startswith("model.lora")]
    config = tmp_path / "salm.yaml"
    config.write_text(yaml.safe_dump(settings.override({}, [f"+{line}" for line in lines])))
    run = experiment.build(
        config,
        [
            f"data.train_ds.input_cfg.0.cuts_path={manifest}",
            f"data.validation_ds.datasets.val_set_0.input_cfg.0.cuts_path={manifest}",
            f"model.pretrained_llm={data / 'llm' / 'llama'}",
            f"model.pretrained_asr={data / 'salm' / 'asr.nemo'}",
            "model.perception.modality_adapter.feat_in=16",
            "model.perception.modality_adapter.d_model=16",
            "+model.encoder_chunk_size_seconds=30",
            "trainer.accelerator=auto",
            "trainer.devices=2",
            f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
        ],
    )
    assert run.model.prompt_formatter is not None
    rate = run.model.sampling_rate
    assert run.model.frame_count(61 * rate) == 2 * run.model.frame_count(
        30 * rate
    ) + run.model.frame_count(rate)
    assert run.model.audio_locator_tag == "<|audioplaceholder|>"
    trained = {path.split(".")[1] for path, on in run.model.trainable.items() if np.any(on)}
    assert trained == {"adapter", "projection"}, "NeMo's freeze_params leave these two"


@pytest.mark.parametrize("name", DUPLEX)
def test_the_data_of_nemos_duplex_configurations_is_accepted(page, name):
    values = _config(name)
    with settings.ignored_report() as ignored:
        data = next(s for s in _sections(page, page.DUPLEX) if s.path == "data").classes[""]
        read = settings.build(data, values["data"], "data")
        _build_data(page, values, page.DUPLEX)
    assert read.frame_length == 0.08 and read.output_roles == ("agent", "Assistant")
    assert {key.rpartition(".")[2] for key in ignored} <= {"shard_seed", "bucket_buffer_size"}


def _build_data(page: ModuleType, values: dict[str, Any], of: str) -> None:
    sections = _sections(page, of)
    loader = next(s for s in sections if s.path.startswith("data.train_ds,")).classes[""]
    settings.build(loader, values["data"]["train_ds"], "data.train_ds")
    common = {k: v for k, v in values["data"]["validation_ds"].items() if k != "datasets"}
    for name, own in values["data"]["validation_ds"]["datasets"].items():
        settings.build(loader, common | own, f"data.validation_ds.datasets.{name}")


def _at(values: dict[str, Any], path: str) -> Any:
    node: Any = values
    for part in path.split("."):
        node = node.get(part) if part and node else None
    return node


def test_scientific_notation_reaches_the_optimizer_as_a_number():
    optimizer = read_optimizer(_config("salm")["model"]["optimizer"])
    assert optimizer.lr == 3e-4
    assert optimizer.betas == (0.9, 0.98)


def test_the_documented_names_of_mesh_sizes_mean_the_same():
    strategy = read_strategy(_config("configs_page")["trainer"]["strategy"])
    sizes = {name: n for name, n in strategy.mesh_sizes(8).items() if n}
    assert sizes == {"data": 1, "fsdp": 1, "tensor": 8, "context": 1}


@pytest.mark.parametrize("key", ["vggnet", "striding_conv1d"])
def test_unsupported_options_are_refused_by_name(page, key):
    encoder = next(s for s in page.sections() if "perception.encoder" in s.path).classes[""]
    with pytest.raises(settings.SettingsError, match=f"subsampling='{key}' is not supported"):
        settings.build(encoder, ENCODER | {"subsampling": key}, "model.perception.encoder")


def test_sixteen_bit_floats_are_refused_by_name(page):
    trainer = next(s for s in page.sections() if s.path == "trainer").classes[""]
    with pytest.raises(settings.SettingsError, match="16-true .*use bf16-true"):
        settings.build(trainer, {"precision": "16-true"}, "trainer")


def test_every_reason_on_the_page_is_given(page):
    for section in page.sections():
        for key in page.keys(section):
            assert key.status in ("honoured", "ignored", "refused")
            assert key.note.strip(), f"{section.path}.{key.name} is empty"


READ_BY_PHASE = r"(warmup|constant|hold)_(steps|ratio)"
"""Schedules read them as f"{phase}_steps"."""
ONE_VALUE = {"pp_size": "one choice", "ep_size": "one choice"}


def test_every_setting_is_read_somewhere(page):
    source = "\n".join(p.read_text() for p in (ROOT / "speechlm2_jax").rglob("*.py"))
    source += (ROOT / "evaluate.py").read_text()
    for cls in [c for s in page.sections() for c in s.classes.values()] + [EvalConfig]:
        for item in dataclasses.fields(cls):
            if re.fullmatch(READ_BY_PHASE, item.name) or item.name in ONE_VALUE:
                continue
            read = rf"\.{item.name}\b|\"{item.name}\""
            assert re.search(read, source), f"{cls.__name__}.{item.name} is never read"
