"""The step as a pure function: accumulation, skipping, donation, meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from speechlm2_jax.batches import HostBatch
from speechlm2_jax.sharding import make_sharding
from tests.training.toy import ToyModel, make_batch, make_programs, one_device

LR = 1e-2
FP32_ATOL = 1e-6


def host(tree):
    return jax.tree.map(np.array, tree)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def assert_close(one, other, atol=FP32_ATOL):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), one, other)


def rows_together(batches):
    """One batch with the rows of several, group by group."""
    arrays = {k: np.concatenate([b.arrays[k] for b in batches], 1) for k in batches[0].arrays}
    return HostBatch(arrays=arrays, ids=(), bucket="together")


@pytest.fixture
def compilations():
    """Grows by one for every program that XLA is given."""
    seen = []

    def note(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(note)
    yield seen
    jax.monitoring.unregister_event_duration_listener(note)


def micro_batches(count=3):
    return [make_batch(i, groups=2, lengths=(5,), seed=7) for i in range(count)]


def accumulate(programs, state, frozen, batches):
    sums = None
    for index, batch in enumerate(batches):
        sums = programs.accumulate(sums, state, frozen, batch, index)
    return programs.finish(state, sums, LR)


def test_accumulation_over_unequal_counts_equals_one_big_batch():
    batches = micro_batches()
    counts = {int(b.arrays["mask"].sum()) for b in batches}
    assert len(counts) == 3
    programs, state, frozen = make_programs(ToyModel(), one_device(), accumulate=3)
    small, small_report = accumulate(programs, state, frozen, batches)
    programs, state, frozen = make_programs(ToyModel(), one_device())
    big, big_report = programs.train(state, frozen, rows_together(batches), LR)
    assert_close(small.trainable, big.trainable)
    assert_close(small.opt_state, big.opt_state)
    assert_close(
        (small_report.loss, small_report.grad_norm, small_report.metrics),
        (big_report.loss, big_report.grad_norm, big_report.metrics),
    )
    assert int(small.buffers["norm.batches_tracked"]) == 3


def test_nemo_exact_averages_means_of_micro_batches():
    batches = micro_batches()
    plain, state, frozen = make_programs(ToyModel(), one_device())
    means = [plain.evaluate(state, frozen, b)["loss"] for b in batches]
    del state
    programs, state, frozen = make_programs(ToyModel(nemo_exact=True), one_device(), accumulate=3)
    _, report = accumulate(programs, state, frozen, batches)
    expected = np.mean([float(m.total / m.count) for m in means])
    np.testing.assert_allclose(report.loss, expected, rtol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing_but_counters():
    programs, state, frozen = make_programs(ToyModel(), one_device())
    state, _ = programs.train(state, frozen, make_batch(0), LR)
    before = host(state)
    state, report = programs.train(state, frozen, make_batch(2, poison=np.nan), LR)
    after = host(state)
    assert not report.applied and not np.isfinite(report.loss)
    assert_same_bits(
        (after.trainable, after.buffers, after.opt_state),
        (before.trainable, before.buffers, before.opt_state),
    )
    assert (after.step, after.skipped) == (2, 1)
    state, report = programs.train(state, frozen, make_batch(4), LR)
    assert report.applied and int(state.skipped) == 1


def test_one_bad_micro_batch_skips_the_whole_step():
    batches = [make_batch(i, lengths=(5,), poison=p) for i, p in enumerate((1.0, np.inf))]
    programs, state, frozen = make_programs(ToyModel(), one_device(), accumulate=2)
    before = host((state.trainable, state.buffers))
    state, report = accumulate(programs, state, frozen, batches)
    assert not report.applied
    assert_same_bits(host((state.trainable, state.buffers)), before)


def test_a_batch_without_targets_is_skipped_not_decayed():
    programs, state, frozen = make_programs(ToyModel(), one_device())
    before = host(state.trainable)
    state, report = programs.train(state, frozen, make_batch(0, empty=True), LR)
    assert not report.applied and report.count == 0 and report.loss == 0
    assert_same_bits(host(state.trainable), before)


def test_one_program_per_shape():
    programs, state, frozen = make_programs(ToyModel(), one_device())
    for index in range(6):
        state, _ = programs.train(state, frozen, make_batch(index), LR)
    assert programs.training_programs == 2


def test_state_is_donated():
    programs, state, frozen = make_programs(ToyModel(), one_device())
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    old = state.trainable["layers.weight"]
    state, _ = programs.train(state, frozen, make_batch(0), LR)
    (program,) = programs._compiled.values()
    assert program.memory_analysis().alias_size_in_bytes >= size
    assert old.is_deleted()


def test_donation_leaves_the_arrays_that_the_model_was_given():
    model = ToyModel()
    model.variables = {path: jnp.asarray(value) for path, value in model.variables.items()}
    kept = host(model.variables)
    programs, state, frozen = make_programs(model, one_device())
    for index in range(3):
        state, _ = programs.train(state, frozen, make_batch(index), LR)
    assert_same_bits(host(model.variables), kept)


def test_random_draws_depend_on_seed_step_and_row_only():
    model = ToyModel(dropout=0.5)
    programs, state, frozen = make_programs(model, one_device())
    _, first = programs.train(state, frozen, make_batch(0), LR)
    programs, state, frozen = make_programs(ToyModel(dropout=0.5), one_device())
    state, again = programs.train(state, frozen, make_batch(0), LR)
    assert first.loss == again.loss
    programs, fresh, frozen = make_programs(ToyModel(dropout=0.5), one_device())
    fresh = type(fresh)(**{**vars(fresh), "step": fresh.step + 1})
    _, later = programs.train(fresh, frozen, make_batch(0), LR)
    assert later.loss != first.loss


def test_partly_frozen_stack_trains_only_its_free_layers():
    mask = np.array([False, True, True, False])
    trainable = {"embedding.weight": False, "layers.weight": mask, "head.weight": True}
    model = ToyModel(trainable={**trainable, "layers.bias": False})
    programs, state, frozen = make_programs(model, one_device())
    assert set(state.trainable) == {"layers.weight", "head.weight"}
    assert "layers.bias" in frozen
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 4
    before = host(state.trainable["layers.weight"])
    state, _ = programs.train(state, frozen, make_batch(0), LR)
    after = host(state.trainable["layers.weight"])
    np.testing.assert_array_equal(after[~mask], before[~mask])
    assert (after[mask] != before[mask]).all()


def test_bf16_keeps_trained_parameters_and_moments_in_fp32():
    programs, state, frozen = make_programs(ToyModel(), one_device(), precision="bf16-true")
    state, report = programs.train(state, frozen, make_batch(0), LR)
    leaves = [*jax.tree.leaves(state.trainable), *jax.tree.leaves(state.opt_state)]
    assert {leaf.dtype.name for leaf in leaves if leaf.ndim} == {"float32"}
    assert frozen["embedding.weight"].dtype == jnp.bfloat16
    assert state.buffers["norm.running_mean"].dtype == jnp.float32
    assert np.isfinite(report.loss)


@pytest.mark.parametrize("sizes", [{"data": 1}, {"data": 2, "fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("accumulate_batches", [1, 2])
def test_nothing_is_compiled_after_the_first_step(compilations, sizes, accumulate_batches):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    sharding = make_sharding(**sizes, devices=devices)
    programs, state, frozen = make_programs(ToyModel(), sharding, accumulate=accumulate_batches)
    for step in range(3):
        before = len(compilations)
        if accumulate_batches == 1:
            state, _ = programs.train(state, frozen, make_batch(0), LR)
        else:
            state, _ = accumulate(programs, state, frozen, [make_batch(0), make_batch(2)])
        assert (len(compilations) > before) == (step == 0)


def test_sums_of_micro_batches_are_added_in_place():
    programs, state, frozen = make_programs(ToyModel(), make_sharding(fsdp=8), accumulate=2)
    sums = programs.accumulate(None, state, frozen, make_batch(0), 0)
    trained = {path: leaf.sharding for path, leaf in state.trainable.items()}
    assert {path: leaf.sharding for path, leaf in sums.grads.items()} == trained
    places = [
        shard.data.unsafe_buffer_pointer()
        for shard in sums.grads["layers.weight"].addressable_shards
    ]
    after = programs.accumulate(sums, state, frozen, make_batch(2), 1)
    assert sums.grads["layers.weight"].is_deleted()
    assert [
        shard.data.unsafe_buffer_pointer()
        for shard in after.grads["layers.weight"].addressable_shards
    ] == places


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_eight_devices_equal_one(sizes):
    many, wide, wide_frozen = make_programs(ToyModel(dropout=0.2), make_sharding(**sizes))
    moment = wide.opt_state[0].mu["layers.weight"]
    assert moment.sharding == wide.trainable["layers.weight"].sharding
    if "fsdp" in sizes:
        assert not moment.sharding.is_fully_replicated
    alone, narrow, narrow_frozen = make_programs(ToyModel(dropout=0.2), one_device())
    for index in range(0, 6, 2):  # one bucket
        wide, wide_report = many.train(wide, wide_frozen, make_batch(index), LR)
        narrow, narrow_report = alone.train(narrow, narrow_frozen, make_batch(index), LR)
        np.testing.assert_allclose(wide_report.loss, narrow_report.loss, rtol=1e-6)
        np.testing.assert_allclose(wide_report.grad_norm, narrow_report.grad_norm, rtol=1e-5)
    assert_close(host(wide.trainable), host(narrow.trainable), atol=1e-5)
    assert_close(host(wide.buffers), host(narrow.buffers))
    assert many.training_programs == 1  # output placements do not lead to a second compilation
