"""Weights stream from files to devices component by component: the host holds no second copy."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from speechlm2_jax.conversion.readers import write_safetensors

ROOT = Path(__file__).parents[2]
LLAMA = ROOT / "tests/data/llm/llama"
LAYERS = 6
MOST = 1.25
"""Memory of its own that loading may take, over the checkpoint's size."""


def write_llm(folder, width):
    """A Llama; gives the size of its weights."""
    inner = 4 * width
    config = json.loads((LLAMA / "config.json").read_text())
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": width // 8}
    config |= {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        **heads,
    }
    square, wide = (width, width), (inner, width)
    shapes = {"model.norm.weight": (width,)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        shapes[name] = (config["vocab_size"], width)
    for layer in range(LAYERS):
        own = f"model.layers.{layer}"
        shapes |= {f"{own}.self_attn.{n}_proj.weight": square for n in "qkvo"}
        shapes |= {f"{own}.mlp.{n}_proj.weight": wide for n in ("gate", "up")}
        shapes[f"{own}.mlp.down_proj.weight"] = wide[::-1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{own}.{norm}.weight"] = (width,)
    if config.get("tie_word_embeddings"):
        del shapes["lm_head.weight"]
    write_safetensors(
        folder / "model.safetensors",
        {name: np.full(shape, 0.01, ml_dtypes.bfloat16) for name, shape in shapes.items()},
    )
    (folder / "config.json").write_text(json.dumps(config))
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.slow  # large checkpoints, read in processes of their own
def test_loading_takes_little_more_memory_than_the_checkpoint(tmp_path):
    sizes, taken = {}, {}
    for width in (64, 1024):  # the small one tells what the programs take
        folder = tmp_path / str(width)
        folder.mkdir()
        sizes[width] = write_llm(folder, width)
        taken[width], placements = loading(folder)
        assert set(placements) == {4}, "every large weight lies on four devices"
    size, of_weights = sizes[1024] - sizes[64], taken[1024] - taken[64]
    assert size > 200e6
    # measured at all: the memory of these devices is the host's, but for whole rows of the file,
    # which stay where they are mapped
    assert size / 2 < of_weights
    assert of_weights < MOST * size


def loading(folder):
    """What `measure` prints, in a process of its own."""
    flags = "--xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, __file__, str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout.splitlines()[-1])


def own_bytes():
    """Memory of this process that is no file's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure(folder):
    """Peak of the memory that placing a frozen LLM takes; on how many devices its weights lie."""
    from speechlm2_jax.models import SALM
    from speechlm2_jax.strategies import FSDPStrategy
    from speechlm2_jax.training.run.preparation import Setup, initialize
    from speechlm2_jax.training.trainer_config import TrainerConfig

    recorded = json.loads((ROOT / "tests/data/salm/llama_adapter.json").read_text())["cfg_in"]
    parts = {"pretrained_llm": folder, "pretrained_asr": str(ROOT / "tests/data/salm/asr.nemo")}
    model = SALM({**recorded, **parts, "tokenizer_path": str(LLAMA), "lora": {"r": 2}})
    setup = Setup.of(model, TrainerConfig(max_steps=1, precision="bf16-true"), FSDPStrategy())
    before, peak, is_done = own_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not is_done.wait(0.002):
            peak = max(peak, own_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = initialize(model, setup)
    is_done.set()
    watcher.join()
    large = [x for path, x in start.frozen.items() if path.startswith("llm.") and x.ndim > 2]
    print(
        json.dumps([max(peak, own_bytes()) - before, [len(x.sharding.device_set) for x in large]])
    )


if __name__ == "__main__":
    measure(sys.argv[1])
