"""A tiny language model and its data: enough of each thing that training must handle.

Frozen embedding, stacked residual layers, a running mean, dropout keyed by row, two buckets.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from speechlm2_jax.batches import HostBatch, LossSum, StepLosses
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.sharding import make_sharding
from speechlm2_jax.training.optimizer import Optimizer, read_optimizer
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.state import Partition, first_state, plan_layout, put
from speechlm2_jax.training.step import StepFunctions
from speechlm2_jax.training.trainer import Trainer, exp_manager
from speechlm2_jax.training.trainer_config import TrainerConfig

VOCAB, WIDTH, LAYERS = 16, 8, 4
MOMENTUM = 0.1


def infos():
    f32, i32 = np.dtype(np.float32), np.dtype(np.int32)
    table = {
        "embedding.weight": ((VOCAB, WIDTH), f32, ("vocab", "embed"), False),
        "layers.weight": ((LAYERS, WIDTH, WIDTH), f32, ("layers", "mlp", "embed"), False),
        "layers.bias": ((LAYERS, WIDTH), f32, ("layers", "mlp"), False),
        "head.weight": ((VOCAB, WIDTH), f32, ("vocab", "embed"), False),
        "norm.running_mean": ((WIDTH,), f32, ("norm",), True),
        "norm.batches_tracked": ((), i32, (), True),
    }
    return {
        path: VariableInfo(shape=s, dtype=d, axes=a, is_buffer=b)
        for path, (s, d, a, b) in table.items()
    }


def variables(seed=0):
    rng = np.random.default_rng(seed)
    values = {p: rng.normal(0, 0.3, i.shape).astype(i.dtype) for p, i in infos().items()}
    return {
        **values,
        "norm.running_mean": np.zeros(WIDTH, np.float32),
        "norm.batches_tracked": np.zeros((), np.int32),
    }


@dataclass
class ToyModel:
    dropout: float = 0.0
    trainable: dict = field(
        default_factory=lambda: {
            "embedding.weight": False,
            "layers.weight": True,
            "layers.bias": True,
            "head.weight": True,
        }
    )
    optimizer: dict = field(
        default_factory=lambda: {
            "_target_": "torch.optim.AdamW",
            "lr": 1e-2,
            "betas": [0.9, 0.98],
            "weight_decay": 1e-2,
            "foreach": True,
        }
    )
    lr_scheduler: dict | None = None
    nemo_exact: bool = False
    compute_dtype: object = jnp.float32
    heads: dict = field(default_factory=dict)
    settings: dict = field(default_factory=lambda: {"width": WIDTH, "kind": "toy"})
    validation_metrics: dict = field(default_factory=dict)
    infos: dict = field(default_factory=infos)
    variables: dict = field(default_factory=variables)
    has_variables: bool = True

    def load_onto(self, layout):
        raise AssertionError("this model has its arrays already")

    def use_remat(self, policies):
        self.policies = policies

    def frame_count(self, samples: int) -> int:
        return samples

    def losses(self, variables, batch, *, key, train):
        x = jnp.take(variables["embedding.weight"], batch["tokens"], axis=0)
        x = x.astype(self.compute_dtype)  # [G, R, T, D]
        mask = batch["mask"]

        def layer(x, weights):
            w, b = (value.astype(x.dtype) for value in weights)
            return x + jnp.tanh(x @ w.T + b[None, None, None, :]), None

        x, _ = jax.lax.scan(layer, x, (variables["layers.weight"], variables["layers.bias"]))
        buffers = {}
        mean = variables["norm.running_mean"]
        if train:
            where = mask[..., None].astype(jnp.float32)
            total = jnp.sum(jax.lax.stop_gradient(x).astype(jnp.float32) * where, (0, 1, 2))
            now = total / jnp.maximum(jnp.sum(where), 1)
            buffers = {
                "norm.running_mean": (1 - MOMENTUM) * mean + MOMENTUM * now,
                "norm.batches_tracked": variables["norm.batches_tracked"] + 1,
            }
        else:  # as batch norm: only evaluation reads what training has gathered
            x = x - mean.astype(x.dtype)[None, None, None, :]
        if self.dropout and key is not None:
            x = self._drop(x, batch["row_ids"], key)
        logits = (x @ variables["head.weight"].astype(x.dtype).T).astype(jnp.float32)
        gold = jnp.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
        loss = (jax.nn.logsumexp(logits, -1) - gold) * batch["poison"]
        hit = jnp.argmax(logits, -1) == batch["targets"]
        count = jnp.sum(mask).astype(jnp.float32)
        return StepLosses(
            loss=LossSum(total=jnp.sum(jnp.where(mask, loss, 0)), count=count),
            metrics={"acc": LossSum(total=jnp.sum(hit & mask).astype(jnp.float32), count=count)},
            buffers=buffers,
        )

    def _drop(self, x, row_ids, key):
        """Hashes the key with row and place: cheaper to compile than jax.random per row."""
        a, b = jax.random.key_data(key)
        place = jnp.arange(x[0, 0].size, dtype=jnp.uint32).reshape(1, 1, *x.shape[2:])
        bits = (place + a) * np.uint32(2654435761) + row_ids[..., None, None].astype(jnp.uint32)
        bits = (bits ^ (bits >> 15) ^ b) * np.uint32(2246822519)
        kept = (bits >> 16) % 256 >= int(256 * self.dropout)
        return jnp.where(kept, x / (1 - self.dropout), 0)

    def flops(self, batch):
        return 6.0 * batch.arrays["tokens"].size * LAYERS * WIDTH * WIDTH

    def save_definition(self, directory):
        directory.mkdir(exist_ok=True)

    def count_tokens(self, batch):
        mask = batch.arrays["mask"]
        return int(mask.sum()), int(mask.size)


def make_batch(index, *, groups=8, rows=2, lengths=(5, 7), poison=1.0, seed=0, empty=False):
    """Batch `index`: random tokens, random lengths, targets that can be learnt (token + 1)."""
    rng = np.random.default_rng((seed, index))
    T = lengths[index % len(lengths)]
    tokens = rng.integers(0, VOCAB, (groups, rows, T)).astype(np.int32)
    valid = rng.integers(1, T + 1, (groups, rows))
    mask = np.arange(T)[None, None] < valid[..., None]
    arrays = {
        "tokens": tokens,
        "targets": (tokens + 1) % VOCAB,
        "mask": mask & (not empty),
        "row_ids": np.arange(groups * rows, dtype=np.int32).reshape(groups, rows),
        "poison": np.full((groups, rows, T), poison, np.float32),
    }
    return HostBatch(arrays=arrays, ids=(f"b{index}-first", f"b{index}-second"), bucket=f"T{T}")


def make_programs(model, sharding, *, accumulate=1, clip=1.0, precision="32-true"):
    """The compiled side of training alone: (programs, first state, frozen parameters)."""
    config = TrainerConfig(precision=precision)
    partition = Partition.of(model.infos, model.trainable)
    transform = read_optimizer(model.optimizer).transform()
    optimizer = Optimizer(transform=transform, clip_norm=clip, masks=partition.masks)
    model.compute_dtype = config.compute_dtype
    layout = plan_layout(model.infos, partition, optimizer, sharding, config.compute_dtype)
    functions = StepFunctions(
        losses=model.losses,
        optimizer=optimizer,
        sharding=sharding,
        seed=1,
        accumulate=accumulate,
        nemo_exact=model.nemo_exact,
    )
    programs = Programs(functions, layout)
    state = first_state(model.variables, layout, optimizer)
    return programs, state, put(model.variables, layout.frozen, copy=False)


def one_device():
    return make_sharding(devices=jax.devices()[:1])


class ToyIterator:
    def __init__(self, data, index):
        self.data, self.index = data, index

    def __iter__(self):
        return self

    def __next__(self):
        if self.data.length is not None and self.index >= self.data.length:
            raise StopIteration
        batch = self.data.batch(self.index)
        self.index += 1
        return batch

    def get_state(self):
        return {"next": self.index}


@dataclass
class ToyData:
    """Endless batches; `bad` maps batch indices to what the loss is multiplied with."""

    rows: int = 2
    lengths: tuple = (5,)
    bad: dict = field(default_factory=dict)
    length: int | None = None
    dropped: dict = field(default_factory=dict)
    on_batch: object = None
    validation: dict = field(default_factory=lambda: {"clean": 2, "noisy": 3})
    settings: dict = field(default_factory=lambda: {"train_ds": {"batch_size": 2}})
    groups: int = 0

    def setup(self, *, frame_count, groups, pad_to_multiple, own_groups):
        self.groups, self.pad_to_multiple = groups, pad_to_multiple

    def batch(self, index):
        if self.on_batch is not None:
            self.on_batch(index)
        poison = self.bad.get(index, 1.0)
        return make_batch(
            index, groups=self.groups, rows=self.rows, lengths=self.lengths, poison=poison
        )

    def training_shapes(self):
        shapes = {"groups": self.groups, "rows": self.rows, "empty": True}
        return {
            f"T{length}": partial(make_batch, 0, lengths=(length,), **shapes)
            for length in sorted(self.lengths)
        }

    def batches_per_pass(self):
        return 10

    def train_batches(self, state):
        return ToyIterator(self, 0 if state is None else state["next"])

    def validation_batches(self, *, own_only=False):
        return {
            name: [
                make_batch(i, groups=self.groups, rows=self.rows, lengths=self.lengths, seed=99)
                for i in range(count)
            ]
            for name, count in self.validation.items()
        }


def make_trainer(run_dir=None, *, experiment=None, **options):
    options = {
        "max_steps": 6,
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "limit_train_batches": 3,
        "gradient_clip_val": 1.0,
        "devices": 1,
        "compilation_cache_dir": os.environ.get("TOY_CACHE"),
        **options,
    }
    trainer = Trainer(**options)
    if run_dir is not None:
        exp_manager(
            trainer,
            {
                "explicit_log_dir": str(run_dir),
                "resume_if_exists": True,
                "resume_ignore_no_checkpoint": True,
                "create_tensorboard_logger": False,
                "checkpoint_callback_params": {"monitor": "val_loss", "save_top_k": 1},
                **(experiment or {}),
            },
        )
    return trainer


def rows_of(run_dir):
    """Rows of metrics.jsonl: (training rows by step, validation rows by step)."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    training = {row["step"]: row for row in rows if "loss" in row}
    return training, {row["step"]: row for row in rows if "val_loss" in row}


if __name__ == "__main__":  # a process of its own, for signals: toy.py RUN_DIR JSON
    arguments = json.loads(sys.argv[2])
    data = ToyData(bad={int(k): float(v) for k, v in arguments.pop("bad", {}).items()})
    if (signal_at := arguments.pop("signal_at", None)) is not None:
        import signal
        import time

        numbers = arguments.pop("signals", ["SIGTERM"])
        saved = arguments.pop("after", None)

        def send(index):
            if index == signal_at:
                while saved is not None and not os.path.isdir(saved):  # in the background
                    time.sleep(0.1)
                for number in numbers:
                    os.kill(os.getpid(), signal.Signals[number])
                    time.sleep(0.2)
                while len(numbers) > 1:  # busy, as in a compilation: nothing is asked any more
                    time.sleep(1)

        data.on_batch = send
    trainer = make_trainer(__import__("pathlib").Path(sys.argv[1]), **arguments)
    trainer.fit(ToyModel(dropout=0.2), data)
