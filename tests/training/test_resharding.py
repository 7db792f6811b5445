"""A SALM's run goes on with fewer devices: the same parameters, data, and losses."""

import json
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from speechlm2_jax import experiment
from speechlm2_jax.checkpointing import load_weights, read_item, step_folders
from speechlm2_jax.compilation_cache import keep_compiled_programs
from tests.training.tiny_salm import write_config

SAVED_AT, MORE = 3, 20
FSDP = "+trainer.strategy={_target_: FSDPStrategy}"
TENSOR = (
    "+trainer.strategy={_target_: ModelParallelStrategy, data_parallel_size: 2, "
    "tensor_parallel_size: 2}"
)


def fit(config, run_dir, devices, steps, *overrides):
    words = [
        f"exp_manager.explicit_log_dir={run_dir}",
        f"trainer.devices={devices}",
        f"trainer.max_steps={steps}",
        "data.train_ds.batch_size=1",
        *overrides,
    ]
    return experiment.build(config, words).fit()


def losses(run_dir):
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """A run that goes on finds the programs of its first steps."""
    keep_compiled_programs(str(tmp_path_factory.mktemp("compiled")))
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A run of eight devices, saved and then gone on with."""
    folder = tmp_path_factory.mktemp("eight")
    trainer = {
        "max_steps": 1,
        "limit_train_batches": 50,
        "log_every_n_steps": 1,
        "limit_val_batches": 0,
    }
    config = write_config(folder, trainer=trainer, seconds={"short": 0.5, "long": 0.5})
    fit(config, folder / "run", 8, SAVED_AT, FSDP)
    shutil.copytree(folder / "run", folder / "saved")
    fit(config, folder / "run", 8, SAVED_AT + MORE, FSDP)
    return folder, config


@pytest.mark.slow  # a minute each; training/test_resume.py does it with a toy
@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (4, (FSDP,)),
        (4, (TENSOR,)),
        (1, ()),
    ],
)
def test_a_run_of_eight_devices_goes_on_with_fewer(eight, tmp_path, devices, strategy):
    folder, config = eight
    shutil.copytree(folder / "saved", tmp_path / "run")
    built = experiment.build(
        config,
        [
            f"exp_manager.explicit_log_dir={tmp_path / 'run'}",
            f"trainer.devices={devices}",
            f"trainer.max_steps={SAVED_AT}",
            "data.train_ds.batch_size=1",
            *strategy,
        ],
    )
    built.fit()  # restores, and finds nothing left to do
    saved = load_weights(folder / "saved", "last").variables
    for path, value in built.model.variables.items():
        np.testing.assert_array_equal(np.asarray(value), saved[path], err_msg=path)

    fit(config, tmp_path / "run", devices, SAVED_AT + MORE, *strategy)
    expected = losses(folder / "run")
    assert len(expected) == SAVED_AT + MORE
    np.testing.assert_allclose(losses(tmp_path / "run"), expected, rtol=1e-5)
    states = [load_state(run) for run in (folder / "run", tmp_path / "run")]
    assert states[0] == states[1]


def load_state(run_dir):
    return read_item(step_folders(run_dir)[0], "progress")["data"]
