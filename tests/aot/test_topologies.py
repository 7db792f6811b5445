"""Real programs compiled for TPUs that are not attached; runs where libtpu can be had.

It needs the folder that `python -m speechlm2_jax.aot.fetch` fills, or LIBTPU_DIR.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from speechlm2_jax.aot.chips import default_folder
from tests.llm.full_size import CONFIGS, PARAMETERS

ROOT = Path(__file__).parents[2]
LIBTPU = Path(os.environ.get("LIBTPU_DIR", default_folder()))
PROGRAM = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from speechlm2_jax.aot.chips import read_topology
from speechlm2_jax.aot.collectives import collectives
from speechlm2_jax.layers.attention import AttentionMask, attend
from speechlm2_jax.sharding import make_sharding, use

topology = read_topology("v5e:2x2", Path(sys.argv[1]))
sharding = make_sharding(fsdp=2, tensor=2, sequence_parallel=True, devices=topology.devices)

def loss(q, k, v, segments, weight):
    with use(sharding):
        mask = AttentionMask(query_segments=segments, key_segments=segments)
        heads = attend(q, k, v, mask=mask, scale=0.1)
        flat = heads.reshape(*heads.shape[:2], -1) @ weight
        from speechlm2_jax.sharding import constrain
        out = constrain(constrain(flat, "batch", "tokens", None), "batch", "time", None)
        return jnp.sum(out.astype(jnp.float32) ** 2)

def leaf(shape, axes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(axes, shape))

heads = ("batch", "tokens", "act_heads", None)
arguments = (
    leaf((4, 512, 8, 128), heads),
    leaf((4, 512, 4, 128), heads),
    leaf((4, 512, 4, 128), heads),
    leaf((4, 512), ("batch", "tokens"), jnp.int32),
    leaf((1024, 1024), ("act_heads", None)),
)
compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 4))).lower(*arguments).compile()
text = compiled.as_text()
print("kernels", text.count("tpu_custom_call"))
print("kinds", *sorted(c.kind for c in collectives(text)))
"""

needs_libtpu = pytest.mark.skipif(
    not (LIBTPU / "libtpu").is_dir(),
    reason=f"no libtpu in {LIBTPU}; python -m speechlm2_jax.aot.fetch gets it (700 MB)",
)


def run(*command: str, timeout_s: int = 500) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@needs_libtpu
def test_splash_attention_compiles_and_sequence_parallel_sums_are_scattered():
    lines = dict(line.split(" ", 1) for line in run("-c", PROGRAM, str(LIBTPU)).splitlines())
    assert int(lines["kernels"]) >= 3  # forward, and both halves of the backward pass
    assert "reduce-scatter" in lines["kinds"]
    assert "all-to-all" not in lines["kinds"]


@needs_libtpu
@pytest.mark.slow  # half a minute of compilation
def test_the_bundled_model_is_priced():
    out = run(
        "train.py",
        *("--config", "salm", "--compile-for", "v5e:2x2", "--libtpu", str(LIBTPU)),
        *("--rows", "2", "--tokens", "64", "--seconds", "2", "trainer.accelerator=auto"),
        *("trainer.devices=-1", "+trainer.strategy=fsdp"),
    )
    report = json.loads(out.splitlines()[-1])
    assert report["fits"] and report["total_bytes"] > 0
    assert report["flops"] > 0 and report["step_s"][0] > 0
    assert {c["kind"] for c in report["collectives"]} >= {"all-gather"}
    assert all(c["bytes_sent"] > 0 for c in report["collectives"])


@pytest.mark.slow  # minutes of compilation each
@needs_libtpu
@pytest.mark.parametrize("name", CONFIGS)
def test_an_llm_of_real_size_is_priced_by_its_config_alone(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    is_fused = CONFIGS[name]["model_type"] == "phi3"
    out = run(
        "train.py",
        *("--config", "salm", "--compile-for", "v5e:2x2", "--libtpu", str(LIBTPU)),
        *("--rows", "1", "--tokens", "128", "--seconds", "2", "trainer.accelerator=auto"),
        *("trainer.devices=-1", "+trainer.strategy=fsdp", f"model.pretrained_llm={tmp_path}"),
        f"+model.tokenizer_path={ROOT / 'configs/parts/tiny_llm'}",
        f"model.lora.target_modules={'[qkv_proj]' if is_fused else '[q_proj, v_proj]'}",
        timeout_s=2400,
    )
    report = json.loads(out.splitlines()[-1])
    assert report["fits"]
    # frozen weights in bf16, a quarter of them on each of the four chips
    assert report["memory"]["frozen parameters and buffers"] > PARAMETERS[name] * 2 / 4
