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

DECODING = """
import re
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from speechlm2_jax.aot.chips import read_topology
from speechlm2_jax.generation import slots as loop
from speechlm2_jax.generation.decoding import DecodingConfig
from speechlm2_jax.inference.meshes import variable_layout
from speechlm2_jax.layers.module import abstract, describe, merge, split
from speechlm2_jax.llm.config import DecoderConfig
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.sharding import for_inference, make_sharding, use

topology = read_topology("v5e:2x2", Path(sys.argv[1]))
placement = for_inference(make_sharding(data=2, tensor=2, devices=topology.devices).mesh)
config = DecoderConfig(
    vocab_size=512, width=256, layers=2, heads=8, kv_heads=4, head_width=int(sys.argv[2]),
    mlp_width=512, tied=True,
)
decoder = abstract(lambda rngs: Decoder(config, rngs=rngs))
graphdef, _ = split(decoder)
layout = variable_layout(describe(decoder), jnp.bfloat16, placement)
decoding = DecodingConfig(max_new_tokens=100, stop_ids=(1,), pad_id=0)
room = loop.SlotShape(count=32, prompt_tokens=120)

def empty(variables):
    with use(placement):
        llm = merge(graphdef, variables)
        return loop.constrained(loop.empty(llm, room, decoding, jnp.bfloat16))

def run(variables, slots, enough):
    with use(placement):
        return loop.constrained(loop.decode(merge(graphdef, variables), slots, decoding, enough))

slots = jax.tree.map(
    lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
    jax.eval_shape(empty, layout),
    jax.jit(empty).lower(layout).compile().output_shardings,
)
enough = jax.ShapeDtypeStruct((), jnp.int32)
compiled = jax.jit(run, donate_argnums=1).lower(layout, slots, enough).compile()
caches = [x for x in jax.tree.leaves(slots.cache) if x.ndim == 5]
kept = caches[0].sharding.shard_shape(caches[0].shape)
text = compiled.as_text()
shape = re.escape("bf16[%s]" % ",".join(map(str, kept)))
print("cache", *kept)
print("kernels", text.count("tpu_custom_call"))
print("copies", len(re.findall(shape + r"\\S* copy[(]", text)))
print("scratch", compiled.memory_analysis().temp_size_in_bytes)
print("cache_bytes", sum(x.size * 2 // 4 for x in caches))
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
@pytest.mark.parametrize(
    ("head_width", "kernels", "cache"), [(128, 1, "2 16 256 4 128"), (64, 0, "2 16 2 224 64")]
)
def test_continuous_batching_decodes_without_a_copy_of_the_cache(head_width, kernels, cache):
    """Of pages for the kernel, or of whole tiles: no layout but the one it is kept in."""
    out = run("-c", DECODING, str(LIBTPU), str(head_width))
    lines = dict(line.split(" ", 1) for line in out.splitlines())
    assert lines["cache"] == cache
    assert int(lines["kernels"]) == kernels
    assert int(lines["copies"]) == 0
    assert int(lines["scratch"]) < int(lines["cache_bytes"]) / 2, "one of keys, or of values"


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
