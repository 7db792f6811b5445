"""NeMo's trainer and exp_manager blocks: what is read, ignored and refused."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from speechlm2_jax.settings import SettingsError, build
from speechlm2_jax.strategies import (
    AutomodelParallelStrategy,
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    build_mesh,
    check_groups,
    check_heads,
    read_strategy,
    remat_policies,
)
from speechlm2_jax.training.exp_manager import CheckpointParams, ExpManagerConfig
from speechlm2_jax.training.trainer import Trainer
from speechlm2_jax.training.trainer_config import TrainerConfig, parse_duration_s

NEMO_TRAINER = {
    "devices": -1,
    "accelerator": "auto",
    "num_nodes": 1,
    "precision": "bf16-true",
    "logger": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
    "max_steps": 100000,
    "limit_train_batches": 100,
    "val_check_interval": 100,
    "limit_val_batches": 10,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 1,
    "gradient_clip_val": 1.0,
    "accumulate_grad_batches": 1,
    "strategy": {
        "_target_": "lightning.pytorch.strategies.DDPStrategy",
        "gradient_as_bucket_view": True,
        "find_unused_parameters": True,
    },
}
NEMO_EXP_MANAGER = {
    "exp_dir": None,
    "explicit_log_dir": "salm_results/",
    "name": "salm",
    "create_tensorboard_logger": False,
    "create_checkpoint_callback": True,
    "use_datetime_version": True,
    "max_time_per_run": "00:03:50:00",
    "resume_from_checkpoint": None,
    "resume_if_exists": True,
    "resume_ignore_no_checkpoint": True,
    "create_wandb_logger": False,
    "wandb_logger_kwargs": {"name": "development-run", "project": "salm", "resume": True},
    "checkpoint_callback_params": {
        "filename": "{step}",
        "monitor": "val_acc",
        "mode": "max",
        "every_n_train_steps": None,
        "every_n_epochs": 1,
        "save_top_k": 1,
        "always_save_nemo": False,
        "save_nemo_on_train_end": False,
    },
}


def test_nemo_trainer_block_is_accepted():
    trainer = Trainer(**NEMO_TRAINER)
    assert trainer.config.max_steps == 100000 and trainer.config.compute_dtype == jnp.bfloat16
    assert trainer.strategy == DDPStrategy()
    intervals = trainer.config.intervals()
    assert (intervals.epoch_batches, intervals.validate_every, intervals.max_steps) == (
        100,
        100,
        100000,
    )


def test_nemo_exp_manager_block_is_accepted():
    config = build(ExpManagerConfig, NEMO_EXP_MANAGER, "exp_manager")
    assert config.time_limit_s == 3 * 3600 + 50 * 60
    assert str(config.run_dir()) == "salm_results"
    params = config.checkpoint_callback_params
    retention = params.retention()
    assert (retention.monitor, retention.mode, retention.top_k) == ("val_acc", "max", 1)
    assert params.saves_after_validation(0) and not params.saves_at_step(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_stepz": 1}, "max_stepz: unknown key; did you mean 'max_steps'"),
        ({"max_steps": "many"}, "trainer.max_steps: expected int"),
        ({"precision": "16-mixed"}, "16-bit float.*bf16-true"),
        ({"precision": 16}, "16-bit float"),
        ({"precision": "64-true"}, "choose one of 32"),
        ({"accelerator": "mps"}, "choose one of"),
        ({"strategy": "deepspeed"}, "unsupported 'deepspeed'"),
        ({"strategy": {"_target_": "x.DeepSpeedStrategy"}}, "DeepSpeedStrategy.*DDPStrategy"),
        ({"strategy": {"_target_": "x.DDPStrategy", "wings": 2}}, "trainer.strategy.wings"),
        ({"gradient_clip_algorithm": "value"}, "only the global norm"),
        ({"callbacks": ["x"]}, "callbacks"),
        ({"limit_train_batches": 0.5}, "endless; give a number"),
        ({"limit_train_batches": 0}, "at least 1"),
        ({"max_time": "3 hours"}, "DD:HH:MM:SS"),
        ({"accumulate_grad_batches": 0}, "at least 1"),
        ({"gradient_clip_val": -1.0}, "negative"),
    ],
)
def test_bad_trainer_keys_are_one_line_that_names_the_fix(options, message):
    with pytest.raises(SettingsError, match=message) as raised:
        Trainer(**options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "max_steps: give the number"),
        ({"max_epochs": 2}, "max_epochs needs an integer"),
        ({"max_steps": 5, "val_check_interval": 0.5}, "endless; give an integer"),
        ({"max_steps": 5, "limit_train_batches": 3, "val_check_interval": 4}, "longer than"),
        ({"max_steps": 5, "val_check_interval": 0}, "at least 1"),
    ],
)
def test_a_rhythm_without_meaning_is_refused(options, message):
    with pytest.raises(SettingsError, match=message):
        Trainer(**options).config.intervals()


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "tpu"])
def test_an_accelerator_that_is_not_there_is_an_error(accelerator):
    with pytest.raises(SettingsError, match=f"accelerator={accelerator} but JAX sees only cpu"):
        TrainerConfig(accelerator=accelerator).choose_devices()


def test_devices_are_chips():
    for every in (-1, "auto"):
        assert len(TrainerConfig(devices=every, accelerator="cpu").choose_devices()) == 8
    assert TrainerConfig(devices=2).choose_devices() == jax.devices()[:2]
    assert TrainerConfig(devices=(5, 1)).choose_devices() == [jax.devices()[i] for i in (5, 1)]
    for wrong in (9, 0, "many", (8,)):
        with pytest.raises(SettingsError, match=r"trainer\.devices"):
            TrainerConfig(devices=wrong).choose_devices()
    with pytest.raises(SettingsError, match="num_nodes=2 but 1 process"):
        TrainerConfig(num_nodes=2).choose_devices()


@pytest.mark.parametrize(
    ("strategy", "sizes"),
    [
        ("auto", (8, 1, 1)),
        ("ddp_find_unused_parameters_true", (8, 1, 1)),
        ({"_target_": "lightning.pytorch.strategies.FSDPStrategy"}, (1, 8, 1)),
        (FSDPStrategy(), (1, 8, 1)),
        (ModelParallelStrategy(), (1, 8, 1)),
        (ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=4), (1, 2, 4)),
        (ModelParallelStrategy(tensor_parallel_size=2), (1, 4, 2)),
        (ModelParallelStrategy(data_parallel_size=4), (1, 4, 2)),
        (ModelParallelStrategy(data_parallel_size=4, fsdp_size=2), (2, 2, 2)),
        (ModelParallelStrategy(data_parallel_size=8, fsdp_size=1), (8, 1, 1)),
        (ModelParallelStrategy(context_parallel_size=2), (1, 4, 1, 2)),
        (ModelParallelStrategy(context_parallel_size=2, tensor_parallel_size=2), (1, 2, 2, 2)),
        ({"_target_": "AutomodelParallelStrategy", "tp_size": 2, "cp_size": 2}, (1, 2, 2, 2)),
        ({"_target_": "AutomodelParallelStrategy", "dp_replicate_size": 2}, (2, 4, 1)),
        ({"_target_": "FSDPStrategy", "sharding_strategy": "NO_SHARD"}, (8, 1, 1)),
        (
            {
                "_target_": "FSDPStrategy",
                "sharding_strategy": "HYBRID_SHARD",
                "device_mesh": [2, 4],
            },
            (2, 4, 1),
        ),
    ],
)
def test_strategies_arrange_the_devices(strategy, sizes):
    sharding = build_mesh(read_strategy(strategy), jax.devices())
    assert tuple(sharding.mesh.shape.values()) == (*sizes, 1)[:4]


def test_sequence_parallelism_shares_the_steps_between_blocks():
    strategy = ModelParallelStrategy(
        tensor_parallel_size=2, context_parallel_size=2, sequence_parallel=True
    )
    sharding = build_mesh(strategy, jax.devices())
    assert sharding.spec(("batch", "time", "act_embed"), (4, 64, 8))[1] == ("context", "tensor")
    assert sharding.spec(("batch", "tokens", "act_mlp"), (4, 64, 8))[1] == "context"
    assert sharding.length_multiple == 4


def test_heads_that_cannot_be_shared_out_are_refused_with_the_sizes_that_fit():
    sharding = build_mesh(ModelParallelStrategy(tensor_parallel_size=8), jax.devices())
    check_heads({"query heads": 16, "key heads": 8}, sharding)
    with pytest.raises(SettingsError, match=r"12 query heads, 4 key heads.*fit: 1, 2, 4$"):
        check_heads({"query heads": 12, "key heads": 4}, sharding)


def test_remat_is_chosen_by_part():
    automodel = AutomodelParallelStrategy(activation_checkpointing_llm=False)
    assert remat_policies("full", automodel) == {"llm": "none", "perception": "full"}
    assert remat_policies({"llm": "dots"}, ModelParallelStrategy()) == {"llm": "dots"}


@pytest.mark.parametrize(
    "strategy",
    [
        ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=2),
        ModelParallelStrategy(data_parallel_size=4, tensor_parallel_size=2, fsdp_size=3),
        ModelParallelStrategy(context_parallel_size=3),
        ModelParallelStrategy(sequence_parallel=True),
        AutomodelParallelStrategy(dp_size=4, dp_replicate_size=3),
    ],
)
def test_sizes_that_do_not_fit_the_devices_are_refused(strategy):
    with pytest.raises(SettingsError, match=r"trainer\.strategy"):
        build_mesh(strategy, jax.devices())


def test_the_error_for_numbers_that_do_not_fit_names_those_that_do():
    strategy = ModelParallelStrategy(data_parallel_size=3, tensor_parallel_size=2)
    with pytest.raises(SettingsError, match=r"is 6, but 8 devices.*8 x 1, 4 x 2, 2 x 4, 1 x 8"):
        build_mesh(strategy, jax.devices())


def test_no_parallelism_that_is_not_there():
    with pytest.raises(SettingsError, match="pp_size"):
        read_strategy({"_target_": "AutomodelParallelStrategy", "pp_size": 2})


def test_groups_are_shared_by_any_size_that_divides_them():
    for size in (1, 2, 4, 8):
        check_groups(8, build_mesh(DDPStrategy(), jax.devices()[:size]))
    with pytest.raises(SettingsError, match="data-parallel size of 1, 2, 3, 6"):
        check_groups(6, build_mesh(DDPStrategy(), jax.devices()[:4]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"explicit_logdir": "x"}, "did you mean 'explicit_log_dir'"),
        ({"create_mlflow_logger": True}, "not supported"),
        ({"ema": {"enable": True}}, "average of the weights"),
        ({"max_time_per_run": "4h"}, "DD:HH:MM:SS"),
        ({"checkpoint_callback_params": {"mode": "best"}}, "mode: expected one of"),
        ({"checkpoint_callback_params": {"dirpath": "x"}}, "explicit_log_dir"),
        ({"checkpoint_callback_params": {"save_top_k": -2}}, "save_top_k"),
    ],
)
def test_bad_exp_manager_keys_are_refused_by_name(options, message):
    with pytest.raises(SettingsError, match=message):
        build(ExpManagerConfig, options, "exp_manager")


def test_run_directory_follows_exp_dir_name_and_version(tmp_path):
    base = {"exp_dir": str(tmp_path), "name": "run"}
    assert ExpManagerConfig(**base, version="a").run_dir() == tmp_path / "run" / "a"
    assert ExpManagerConfig(**base, resume_if_exists=True).run_dir() == tmp_path / "run"
    dated = ExpManagerConfig(**base).run_dir()
    assert dated.parent == tmp_path / "run" and len(dated.name) == len("2026-01-01_00-00-00")
    numbered = ExpManagerConfig(**base, use_datetime_version=False)
    assert numbered.run_dir().name == "version_0"
    numbered.run_dir().mkdir(parents=True)
    assert numbered.run_dir().name == "version_1"


def test_durations():
    assert parse_duration_s("01:02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4
    assert parse_duration_s({"hours": 1, "seconds": 5}) == 3605
    with pytest.raises(ValueError, match="DD:HH"):
        parse_duration_s({"weeks": 1})


@pytest.mark.parametrize("cls", [TrainerConfig, ExpManagerConfig, CheckpointParams])
def test_no_key_is_both_read_and_ignored(cls):
    fields = {f.name for f in dataclasses.fields(cls)}
    assert not fields & (cls.IGNORED.keys() | cls.REFUSED.keys())
    assert not cls.IGNORED.keys() & cls.REFUSED.keys()
