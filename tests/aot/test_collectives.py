"""Collectives counted off compiled text: by kind, through loops, and as bytes that are sent."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from speechlm2_jax.aot.collectives import Collective, collectives

DEVICES, ROUNDS, WIDTH = 8, 5, 32
SIZE = DEVICES * WIDTH * 4
"""Bytes of the whole array."""
PART = WIDTH * 4


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()[:DEVICES]), ("x",))


def compiled_text(mesh, body, rounds):
    """The text of `body`, per device on its part [WIDTH], run so many times in a loop."""

    @partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    def program(part):
        return jax.lax.fori_loop(0, rounds, lambda _, x: body(x), part)

    array = jax.ShapeDtypeStruct(
        (DEVICES * WIDTH,), jnp.float32, sharding=NamedSharding(mesh, P("x"))
    )
    return jax.jit(program).lower(array).compile().as_text()


def ring(x):
    return jax.lax.ppermute(x, "x", [(i, (i + 1) % DEVICES) for i in range(DEVICES)])


EXPECTED = {
    "all-reduce": (lambda x: jax.lax.psum(x, "x"), 2 * 7 * PART / 8),
    "all-gather": (lambda x: jax.lax.all_gather(x, "x", tiled=True)[:WIDTH] + 1, 7 * SIZE / 8),
    "collective-permute": (ring, PART),
}


@pytest.mark.parametrize("kind", EXPECTED)
@pytest.mark.parametrize("rounds", [1, ROUNDS])
def test_a_collective_counts_as_often_as_it_runs(mesh, kind, rounds):
    body, sent = EXPECTED[kind]
    assert collectives(compiled_text(mesh, body, rounds)) == [
        Collective(kind=kind, count=rounds, bytes_sent=int(rounds * sent))
    ]


# what the TPU compiler writes, shortened: a fused reduce-scatter, an asynchronous all-gather, and
# groups listed one by one
TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (p: bf16[64,16]) -> bf16[16,16] {
  %p = bf16[64,16]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.9 = bf16[64,16]{1,0:T(8,128)(2,1)} all-reduce(%p), replica_groups=[4,4]<=[16]
  ROOT %slice = bf16[16,16]{1,0} dynamic-slice(%all-reduce.9, %c, %c), dynamic_slice_sizes={16,16}
}

%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%wide.cond (s: (s32[], bf16[64,16])) -> pred[] {
  %bound = s32[]{:T(128)} constant(28)
  %s = (s32[]{:T(128)}, bf16[64,16]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %less = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

%wide.body (s: (s32[], bf16[64,16])) -> (s32[], bf16[64,16]) {
  %s = (s32[]{:T(128)}, bf16[64,16]{1,0}) parameter(0)
  %fused = bf16[16,16]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[64,16]) tuple(%i, %x)
}

ENTRY %main.1 (p: bf16[64,16]) -> bf16[64,16] {
  %p = bf16[64,16]{1,0} parameter(0)
  %gather = (bf16[16,16], bf16[64,16]) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}
  %gathered = bf16[64,16]{1,0} all-gather-done(%gather)
  %loop = (s32[], bf16[64,16]{1,0}) while(%start), condition=%wide.cond, body=%wide.body
}
"""


def test_the_tpu_compilers_way_of_writing():
    whole = 64 * 16 * 2
    assert collectives(TPU) == [
        Collective(kind="all-gather", count=1, bytes_sent=whole * 3 // 4),
        Collective(kind="reduce-scatter", count=28, bytes_sent=28 * whole * 3 // 4),
    ]


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("HloModule nothing")
