"""Processes share a validation: each reads and scores its own part, and all get the sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.batches import LossSum
from speechlm2_jax.sharding import make_sharding, place
from speechlm2_jax.training import validation_shares
from speechlm2_jax.training.protocol import Sample, Scored
from speechlm2_jax.training.validation import Validator
from tests.quick_compilation import FLAGS
from tests.training.tiny_salm import write_config
from tests.training.toy import make_batch

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("nemo_exact", [False, True])
def test_sums_of_batches_are_added_over_processes_before_their_means(monkeypatch, nemo_exact):
    counts = {0: [(1, 4), (0, 0)], 1: [(2, 6), (3, 5)]}  # of two batches

    def one(index):
        """What a process counts, and what it sends."""
        left = iter(counts[index])

        def metric(batch):
            total, count = next(left)
            samples = (Sample(id=f"{index}-{count}", reference="", hypothesis=""),)
            return Scored(total=total, count=count, samples=samples if count else ())

        return Validator(
            host_metrics={"wer": metric}, nemo_exact=nemo_exact, samples=2, is_shared=True
        )

    batches = {"clean": [make_batch(n, groups=1) for n in range(2)]}
    sent = []

    def first_pass(text):
        sent.append(text)
        return [text]

    for index in counts:
        monkeypatch.setattr(validation_shares, "gather_texts", first_pass)
        one(index).run(batches, lambda batch: {})
    monkeypatch.setattr(validation_shares, "gather_texts", lambda text: sent)
    found = one(0).run(batches, lambda batch: {"loss": LossSum(total=1.0, count=2.0)})
    wer = (3 / 10 + 3 / 5) / 2 if nemo_exact else 6 / 15
    assert found.metrics["val_wer_clean"] == wer and found.metrics["val_loss"] == 0.5
    assert len(found.samples["clean"]) == 2
    assert {s.id for s in found.samples["clean"]} < {"0-4", "1-6", "1-5"}


def test_own_copies_are_arrays_of_this_process_alone():
    """Here of one process, all of whose devices are its own: nothing to share."""
    sharding = make_sharding(data=2, tensor=2, fsdp=2)
    assert sharding.own_mesh() is None
    arrays = place({"a": np.arange(8.0)}, {"a": ("mlp",)}, sharding)
    assert validation_shares.own_copies(arrays, None) is arrays
    own = validation_shares.own_copies(arrays, sharding.mesh)
    assert own["a"] is arrays["a"], "addressable as it is"


MESHES = """
import jax, numpy as np
from speechlm2_jax import processes
from speechlm2_jax.sharding import make_sharding, mesh_of
from speechlm2_jax.training.validation_shares import own_copies
processes.initialize()
index = jax.process_index()
whole = {"a": np.arange(8.0), "b": np.ones((4, 4))}
for sizes in (dict(data=4), dict(data=2, tensor=2), dict(data=2, fsdp=2)):
    sharding = make_sharding(**sizes)
    placed = {
        "a": jax.device_put(whole["a"], sharding.named(("mlp",), (8,))),
        "b": jax.device_put(whole["b"], sharding.named(("embed", None), (4, 4))),
    }
    own = own_copies(placed, sharding.own_mesh())
    for name, value in own.items():
        assert value.is_fully_addressable and (np.asarray(value) == whole[name]).all()
    assert {d.process_index for d in mesh_of(own).devices.flat} == {index}
    groups = processes.gather_texts(str(sharding.own_groups(sharding.data_parallel_size)))
    assert len(set(groups)) == 2
for sizes in (dict(fsdp=4), dict(tensor=4), dict(context=4), dict(data=2, fsdp=2)):
    sharding = make_sharding(**sizes, devices=[jax.devices()[i] for i in (0, 2, 1, 3)])
    assert sharding.own_mesh() is None, sizes
print("same", flush=True)
"""


def run(processes_, script, *arguments, devices=1, folder=None):
    """Runs a program by some processes with CPU devices of their own; what it printed."""
    launch = ["-m", "speechlm2_jax.launch", "-n", str(processes_)] if processes_ > 1 else []
    done = subprocess.run(
        [sys.executable, *launch, str(script), *map(str, arguments)],
        cwd=folder or ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{FLAGS} --xla_force_host_platform_device_count={devices}",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # two processes
def test_a_process_with_whole_copies_has_a_mesh_of_its_own(tmp_path):
    script = tmp_path / "meshes.py"
    script.write_text(MESHES)
    assert "same" in run(2, script, devices=2)


VALIDATE = """
import json, sys
from pathlib import Path
import jax
from speechlm2_jax import experiment, validation_scores
from speechlm2_jax.evaluation.duplex.scoring import DuplexScorer
config, out, *overrides = sys.argv[1:]
made = []

def counted(act):
    def counting(first, examples, *more):
        made.extend(example.id for example in examples)
        return act(first, examples, *more)
    return counting

validation_scores.hypotheses = counted(validation_scores.hypotheses)
DuplexScorer.generate = counted(DuplexScorer.generate)
run = experiment.read_run(config, overrides)
run.initialize_processes()
one = run.build()
metrics, scoring = validation_scores.validation_scores(one.model)
found = one.trainer.validate(
    one.model, one.datamodule, validation_metrics=metrics, validation_scoring=scoring
)
result = {"metrics": found, "made": made}
Path(f"{out}.{jax.process_index()}").write_text(json.dumps(result))
"""


def validate(kind, folder, processes_, *overrides):
    """The result of each process."""
    folder.mkdir()
    script = folder / "validate.py"
    script.write_text(VALIDATE)
    config = "s2s_duplex"
    if kind == "salm":
        config = write_config(
            folder, trainer={"devices": 2, "precision": "32-true", "max_steps": 1}
        )
    names = (config, folder / "out", f"exp_manager.explicit_log_dir={folder / 'run'}")
    run(processes_, script, *names, *overrides, devices=2 // processes_)
    return [json.loads((folder / f"out.{n}").read_text()) for n in range(processes_)]


@pytest.mark.slow  # five processes for each kind of model
@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("salm", ()),
        ("duplex", ("trainer.limit_val_batches=2", "data.validation_ds.batch_size=2")),
    ],
)
def test_two_processes_validate_as_one_does(kind, overrides, tmp_path):
    (one,) = validate(kind, tmp_path / "one", 1, *overrides)
    assert len(one["metrics"]) > 2 and len(one["made"]) >= 4
    two = validate(kind, tmp_path / "two", 2, *overrides)
    for found in two:
        assert found["metrics"].keys() == one["metrics"].keys()
        for name, value in one["metrics"].items():
            # losses are summed over devices in another order; scores of texts are counts
            exact = not name.startswith(("val_loss", "val_text_loss", "val_audio_loss"))
            assert found["metrics"][name] == (value if exact else pytest.approx(value, rel=1e-6))
    made = [found["made"] for found in two]
    assert sorted(made[0] + made[1]) == sorted(one["made"]) and all(made)
    # where the weights lie on both, they generate together
    fsdp = "+trainer.strategy={_target_: FSDPStrategy}"
    if kind == "salm":
        for found in validate(kind, tmp_path / "fsdp", 2, fsdp, *overrides):
            assert found["metrics"]["val_wer"] == one["metrics"]["val_wer"]
            assert sorted(found["made"]) == sorted(one["made"])
