"""Saving in the background, what is kept, and reading back whatever happened."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.checkpointing import (
    Checkpointer,
    LayoutError,
    Retention,
    load_weights,
    restore,
    saving,
    set_aside_newer,
    step_folders,
)
from speechlm2_jax.sharding import make_sharding

AXES = {"a.weight": ("mlp", "embed"), "a.bias": ("mlp",)}
FROZEN = {"base.weight": np.arange(6, dtype=jnp.bfloat16).reshape(2, 3)}
SETTINGS = {"kind": "test", "width": 8}


def arrays(value, sharding=None):
    params = {"a.weight": np.full((8, 8), value, np.float32), "a.bias": np.arange(8.0)}
    params = {k: np.asarray(v, np.float32) + value for k, v in params.items()}
    if sharding is not None:
        params = {k: jax.device_put(v, sharding.named(AXES[k])) for k, v in params.items()}
    else:
        params = {k: jnp.asarray(v) for k, v in params.items()}
    return {
        "params": params,
        "buffers": {"n.count": jnp.asarray(value, jnp.int32)},
        "opt": {"moment": {k: v * 2 for k, v in params.items()}},
    }


def template(sharding):
    def describe(path, leaf):
        path = path[-1].key
        placement = sharding.named(AXES[path]) if path in AXES else sharding.replicated
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placement)

    return jax.tree_util.tree_map_with_path(describe, arrays(0))


def frozen_template(sharding):
    leaf = FROZEN["base.weight"]
    return {
        "base.weight": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.replicated)
    }


def one_device():
    return make_sharding(devices=jax.devices()[:1])


def save_all(folder, values, *, retention=None, metrics=None):
    checkpointer = Checkpointer(folder, retention or Retention(top_k=-1))
    checkpointer.save_frozen({k: jnp.asarray(v) for k, v in FROZEN.items()})
    for step, value in values.items():
        if metrics and step in metrics:
            checkpointer.rank(step, metrics[step])
        checkpointer.save(step, arrays(value), progress={"step": step}, settings=SETTINGS)
    checkpointer.close()


def read(folder, sharding=None):
    sharding = sharding or one_device()
    return restore(folder, None, template(sharding), frozen_template(sharding))


def assert_holds(restored, value):
    jax.tree.map(np.testing.assert_array_equal, restored.arrays, arrays(value))
    np.testing.assert_array_equal(restored.frozen["base.weight"], FROZEN["base.weight"])


def steps(folder):
    return sorted(int(p.name) for p in step_folders(folder))


def test_everything_comes_back_bit_for_bit(tmp_path):
    save_all(tmp_path, {3: 1})
    restored = read(tmp_path)
    assert_holds(restored, 1)
    assert restored.progress == {"step": 3} and restored.step.name == "3"


def test_frozen_parameters_are_written_once(tmp_path):
    save_all(tmp_path, {1: 1})
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "frozen").rglob("*")}
    save_all(tmp_path, {2: 2})
    assert written == {p: p.stat().st_mtime_ns for p in (tmp_path / "frozen").rglob("*")}
    assert not list((tmp_path / "2").rglob("*base*"))


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
    replace = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(arrays(5))
    checkpointer = Checkpointer(tmp_path, Retention())
    checkpointer.save_frozen({k: jnp.asarray(v) for k, v in FROZEN.items()})
    checkpointer.save(1, state, progress={}, settings={})
    jax.block_until_ready(replace(state))
    checkpointer.close()
    assert_holds(read(tmp_path), 5)


def test_another_mesh_reads_the_same_values(tmp_path):
    wide = make_sharding(data=2, fsdp=2, tensor=2)
    checkpointer = Checkpointer(tmp_path, Retention())
    checkpointer.save_frozen({k: jnp.asarray(v) for k, v in FROZEN.items()})
    checkpointer.save(1, arrays(4, wide), progress={}, settings={})
    checkpointer.close()
    for sharding in (make_sharding(fsdp=8), make_sharding(tensor=8), one_device()):
        restored = read(tmp_path, sharding)
        assert_holds(restored, 4)
        weight = restored.arrays["params"]["a.weight"]
        assert weight.sharding == sharding.named(AXES["a.weight"])


@pytest.mark.parametrize(
    ("mode", "top_k", "kept", "best"),
    [
        ("min", 1, [2, 4, 5], 2),
        ("max", 1, [4, 5], 4),
        ("min", 2, [2, 3, 4, 5], 2),
        ("min", 0, [4, 5], 5),
    ],
)
def test_the_best_and_the_latest_are_kept(tmp_path, mode, top_k, kept, best):
    values = {1: 0.9, 2: 0.1, 3: 0.5, 4: float("nan"), 5: 2.0}
    if mode == "max":
        values |= {4: 3.0}
    metrics = {step: {"val_x": v, "val_y": 0.0} for step, v in values.items()}
    retention = Retention(monitor="val_x", mode=mode, top_k=top_k)
    save_all(tmp_path, {s: s for s in values}, retention=retention, metrics=metrics)
    assert steps(tmp_path) == kept
    assert load_weights(tmp_path).step == best and load_weights(tmp_path, "last").step == 5


def test_a_step_without_metrics_is_latest_but_never_best(tmp_path):
    retention = Retention(monitor="val_x")
    metrics = {1: {"val_x": 0.5}, 2: {"val_x": 0.7}}
    save_all(tmp_path, {1: 1, 2: 2, 3: 3}, retention=retention, metrics=metrics)
    assert steps(tmp_path) == [1, 2, 3] and load_weights(tmp_path, "best").step == 1
    save_all(tmp_path, {4: 4}, retention=retention)
    assert steps(tmp_path) == [1, 3, 4]


def test_a_step_can_be_ranked_after_it_was_saved(tmp_path):
    save_all(tmp_path, {1: 1, 2: 2}, metrics={1: {"val_loss": 0.5}})
    checkpointer = Checkpointer(tmp_path, Retention())
    checkpointer.rank(2, {"val_loss": 0.3})
    checkpointer.close()
    assert load_weights(tmp_path).step == 2


def test_weights_are_read_alone_with_their_settings(tmp_path):
    save_all(tmp_path / "checkpoints", {1: 1, 2: 2})
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints" / "2"):
        weights = load_weights(place)
        assert weights.step == 2 and weights.settings == SETTINGS
        assert all(isinstance(v, np.ndarray) for v in weights.variables.values())
        expected = {**FROZEN, **arrays(2)["params"], **arrays(2)["buffers"]}
        assert weights.variables.keys() == expected.keys()
        for path, value in expected.items():
            assert weights.variables[path].dtype == value.dtype
            np.testing.assert_array_equal(weights.variables[path], value)
    assert load_weights(tmp_path, 1).step == 1
    with pytest.raises(FileNotFoundError, match="step 9 is not kept; the kept steps are 2, 1"):
        load_weights(tmp_path, 9)
    with pytest.raises(FileNotFoundError, match="none of the steps 2, 1 has a val_loss"):
        load_weights(tmp_path, "best")
    with pytest.raises(FileNotFoundError, match="no checkpoint found"):
        load_weights(tmp_path / "elsewhere")


# tensorstore may end a read after Orbax, on another failure, has closed its event loop
damaged_reads = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def damage(step, how):
    if how == "an item is gone":
        shutil.rmtree(step / "opt")
    elif how == "data is cut":
        for file in (step / "params").rglob("*"):
            if file.is_file() and file.parent.name == "d":
                file.write_bytes(file.read_bytes()[:10])
    elif how == "json is cut":
        (step / "progress" / "metadata").write_text("{")
    elif how == "a manifest is gone":
        for file in (step / "opt").rglob("manifest*"):
            file.unlink()
    else:
        shutil.rmtree(step / "params")


@damaged_reads
@pytest.mark.parametrize(
    "how",
    ["an item is gone", "data is cut", "json is cut", "a manifest is gone", "params are gone"],
)
def test_a_damaged_newest_checkpoint_falls_back_with_a_warning(tmp_path, caplog, how):
    save_all(tmp_path, {1: 1, 2: 2})
    damage(tmp_path / "2", how)
    restored = read(tmp_path)
    assert_holds(restored, 1)
    assert f"cannot read checkpoint {tmp_path / '2'}" in caplog.text
    set_aside_newer(tmp_path, 1)
    assert steps(tmp_path) == [1] and (tmp_path / "unreadable_2").is_dir()
    save_all(tmp_path, {2: 7})
    assert_holds(read(tmp_path), 7)


@damaged_reads
def test_no_readable_checkpoint_is_an_error_not_a_new_start(tmp_path):
    save_all(tmp_path, {1: 1})
    damage(tmp_path / "1", "an item is gone")
    with pytest.raises(RuntimeError, match="no checkpoint of .* can be read"):
        read(tmp_path)


def test_the_order_is_own_then_other_then_nothing(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    args = (template(one_device()), frozen_template(one_device()))
    assert restore(own, other, *args) is None
    save_all(other, {5: 5, 6: 6})
    assert_holds(restore(own, other, *args), 6)
    assert_holds(restore(own, other / "5", *args), 5)
    save_all(own, {1: 1})
    assert_holds(restore(own, other, *args), 1)


def test_other_variables_are_named(tmp_path):
    save_all(tmp_path, {1: 1})
    wanted = template(one_device())
    leaf = wanted["params"].pop("a.bias")
    wanted["params"]["b.bias"] = leaf
    wanted["params"]["a.weight"] = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    with pytest.raises(LayoutError) as raised:
        restore(tmp_path, None, wanted, frozen_template(one_device()))
    for words in ("b.bias is not in the checkpoint", "a.bias is not in the model", "(8, 8)"):
        assert words in str(raised.value)


KILLED = """
import os, signal, sys
sys.path.insert(0, {root!r})
from tests.test_checkpointing import Checkpointer, Path, Retention, arrays, save_all
folder = Path({folder!r})
save_all(folder, {{1: 1}})
checkpointer = Checkpointer(folder, Retention(top_k=-1))
checkpointer.save(2, arrays(2), progress={{"step": 2}}, settings={{}})
os.kill(os.getpid(), signal.SIGKILL)  # the save goes on in the background
"""


def test_a_kill_while_saving_leaves_the_one_before(tmp_path):
    root = str(Path(__file__).parents[1])
    script = KILLED.format(root=root, folder=str(tmp_path))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert steps(tmp_path) == [1]
    assert_holds(read(tmp_path), 1)
    save_all(tmp_path, {2: 3})
    assert steps(tmp_path) == [1, 2] and not list(tmp_path.glob("*tmp*"))
    assert_holds(read(tmp_path), 3)


@damaged_reads
def test_orbax_keeps_quiet(tmp_path, capfd):
    save_all(tmp_path, {1: 1, 2: 2})
    damage(tmp_path / "2", "data is cut")
    read(tmp_path)
    captured = capfd.readouterr()
    assert "absl" not in captured.err and "Orbax" not in captured.out + captured.err


def test_after_an_error_a_save_that_other_processes_do_not_finish_is_given_up(
    tmp_path, monkeypatch, caplog
):
    checkpointer = Checkpointer(tmp_path, Retention())
    released = threading.Event()
    monkeypatch.setattr(checkpointer, "wait", released.wait)
    monkeypatch.setattr(saving, "FAILED_WAIT_S", 0.05)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        checkpointer.exit(OSError, OSError("full"), None)
        assert "given up" in caplog.text
    finally:
        released.set()


OUTPUT_FAILS = """
import sys
from speechlm2_jax import experiment, processes
from speechlm2_jax.training.run.disk_errors import DiskError

def refuse(*args):
    raise OSError(28, "No space left on device")

processes.are_several = lambda: True
sys.stdout.flush = sys.stderr.write = refuse
import atexit
atexit.register(lambda: print("a normal exit"))
with {context}:
    raise {error}
"""


@pytest.mark.parametrize(
    ("context", "error"),
    [
        ("processes.exit_on_error()", "KeyError('a')"),
        ("experiment.clear_errors('train.py')", "DiskError('full')"),
    ],
)
def test_a_process_ends_at_once_also_if_its_last_words_cannot_be_written(context, error):
    program = OUTPUT_FAILS.format(context=context, error=error)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
