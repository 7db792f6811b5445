"""Loading is total both ways and its inverse is exact; whatever does not fit is named."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.mapping import Ignored, Rule, Table, aliases, export, load, names
from speechlm2_jax.conversion.readers import LazySource, memory_source
from speechlm2_jax.conversion.readers.source import TensorInfo
from speechlm2_jax.conversion.stream_to_mesh import onto
from speechlm2_jax.conversion.transforms import Permute, Recount, Squeeze
from speechlm2_jax.layers.module import VariableInfo
from speechlm2_jax.sharding import make_sharding
from tests.conversion.goldens import assert_same_bits


def info(shape, axes, dtype=jnp.float32, is_buffer=False) -> VariableInfo:
    return VariableInfo(shape=shape, dtype=jnp.dtype(dtype), axes=axes, is_buffer=is_buffer)


TABLE = Table(
    (
        Rule(source="h.{layer}.q.weight", target="layers.query.weight"),
        Rule(source="h.{layer}.conv.weight", target="layers.conv", transform=Squeeze((1,))),
        Rule(source="h.{layer}.seen", target="layers.seen", transform=Recount()),
        Rule(
            source="embed.weight",
            target="embedding.weight",
            aliases=("head.weight",),
            also=("old.embed.weight",),
            parameter="head.weight",
        ),
        Rule(source="fb", target="filterbank", transform=Squeeze((0,))),
    ),
    (Ignored(r"h\.\d+\.rotary", "computed from the config"),),
)
INFOS = {
    "layers.query.weight": info((2, 8, 4), ("layers", "heads", "embed")),
    "layers.conv": info((2, 8, 3), ("layers", "conv", None)),
    "layers.seen": info((2,), ("layers",), jnp.int32, is_buffer=True),
    "embedding.weight": info((16, 4), ("vocab", "embed")),
    "filterbank": info((5, 7), ("feature", "feature"), is_buffer=True),
}


def foreign(dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {
        "embed.weight": rng.normal(size=(16, 4)).astype(dtype),
        "fb": rng.normal(size=(1, 5, 7)).astype(np.float32),
    }
    for layer in range(2):
        tensors[f"h.{layer}.q.weight"] = rng.normal(size=(8, 4)).astype(dtype)
        tensors[f"h.{layer}.conv.weight"] = rng.normal(size=(8, 1, 3)).astype(dtype)
        tensors[f"h.{layer}.seen"] = np.array(7 + layer, np.int64)
    return tensors


def refused(tensors, match, table=TABLE, infos=INFOS, source_aliases=None):
    with pytest.raises(ConversionError, match=match):
        load(memory_source(tensors, source_aliases), table, infos)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_export_of_load_is_the_source_bit_for_bit(dtype):
    tensors = foreign(dtype)
    variables = load(memory_source(tensors), TABLE, INFOS)
    assert {path: x.shape for path, x in variables.items()} == {
        path: i.shape for path, i in INFOS.items()
    }
    assert variables["layers.seen"].dtype == np.int32
    np.testing.assert_array_equal(variables["layers.conv"][1], tensors["h.1.conv.weight"][:, 0])
    assert_same_bits(export(variables, TABLE), tensors)


def test_unmatched_tensor_is_named_with_its_nearest_rule():
    refused(
        {**foreign(), "h.0.q.bias": np.zeros(8)},
        r"h\.0\.q\.bias \(nearest: h\.0\.q\.weight\)",
    )


def test_tensor_of_one_layer_too_many_is_refused():
    refused({**foreign(), "h.2.q.weight": np.zeros((8, 4), np.float32)}, r"h\.2\.q\.weight")


@pytest.mark.parametrize("missing", sorted(foreign()))
def test_unfilled_variable_is_named(missing):
    tensors = foreign()
    del tensors[missing]
    refused(tensors, f"lacks {missing}")


def test_renamed_tensor_is_suggested():
    tensors = foreign()
    tensors["embed.weights"] = tensors.pop("embed.weight")
    refused(tensors, r"lacks embed\.weight \(nearest: embed\.weights\)")


def test_wrong_shape_is_named():
    tensors = {**foreign(), "h.1.q.weight": np.zeros((4, 8), np.float32)}
    refused(tensors, r"h\.1\.q\.weight has shape \(4, 8\)")
    refused(
        {**foreign(), "h.1.conv.weight": np.zeros((8, 2, 3), np.float32)}, r"should have size 1"
    )


def test_wrong_kind_of_number_is_named():
    refused({**foreign(), "embed.weight": np.zeros((16, 4), np.int32)}, r"embed\.weight is int32")
    refused({**foreign(), "h.0.seen": np.array(1.0)}, "should be int64")
    mixed = {**foreign(), "h.1.q.weight": np.zeros((8, 4), np.float16)}
    refused(mixed, r"h\.1\.q\.weight is float16 but h\.0\.q\.weight is float32")


@pytest.mark.parametrize("name", ["embed.weight", "h.1.q.weight", "fb"])
def test_values_that_are_not_finite_are_named(name):
    tensors = foreign()
    tensors[name] = np.full_like(tensors[name], np.nan)
    with pytest.raises(ConversionError, match=f"{name} holds values that are not finite"):
        load(memory_source(tensors), TABLE, INFOS)


def test_counter_that_does_not_fit_is_refused():
    refused({**foreign(), "h.0.seen": np.array(2**31, np.int64)}, "2147483648 does not fit")


def test_two_rules_for_one_variable_or_one_tensor_are_refused():
    twice = Table((*TABLE.rules, Rule(source="other", target="filterbank")))
    refused({**foreign(), "other": np.zeros((5, 7))}, "two rules fill filterbank", twice)
    both = Table((*TABLE.rules, Rule(source="fb", target="copy", transform=Squeeze((0,)))))
    infos = {**INFOS, "copy": INFOS["filterbank"]}
    refused(foreign(), "fb would fill both filterbank and copy", both, infos)


def test_table_and_model_must_name_the_same_variables():
    refused(
        foreign(), "no rule of the table fills extra", infos={**INFOS, "extra": INFOS["filterbank"]}
    )
    fewer = {path: i for path, i in INFOS.items() if path != "filterbank"}
    refused(foreign(), "the model lacks, filterbank", infos=fewer)


def test_ignored_tensors_are_left_out_by_their_whole_name():
    rotary = np.zeros(3, np.float32)
    variables = load(memory_source({**foreign(), "h.0.rotary": rotary}), TABLE, INFOS)
    assert_same_bits(export(variables, TABLE), foreign())
    refused({**foreign(), "h.0.rotary.more": rotary}, r"h\.0\.rotary\.more")


def test_one_tensor_is_found_under_any_of_its_names():
    expected = load(memory_source(foreign()), TABLE, INFOS)
    for name in ("head.weight", "old.embed.weight"):
        tensors = foreign()
        tensors[name] = tensors.pop("embed.weight")
        assert_same_bits(load(memory_source(tensors), TABLE, INFOS), expected)
    both = {**foreign(), "head.weight": foreign()["embed.weight"]}
    assert_same_bits(load(memory_source(both), TABLE, INFOS), expected)
    listed = load(memory_source(foreign(), {"head.weight": "embed.weight"}), TABLE, INFOS)
    assert_same_bits(listed, expected)


def test_names_of_one_tensor_must_agree_to_the_bit():
    other = foreign()["embed.weight"].copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    refused({**foreign(), "head.weight": other}, r"embed\.weight and head\.weight are one tensor")


def test_unknown_alias_of_a_file_is_refused():
    refused(foreign(), r"tail\.weight", source_aliases={"tail.weight": "embed.weight"})


def test_aliases_are_those_of_the_rules():
    assert aliases(TABLE) == {"head.weight": "embed.weight"}
    assert aliases(TABLE.prefixed(source="a.")) == {"a.head.weight": "a.embed.weight"}


def test_every_slice_has_its_names():
    slices = {s.name: s for s in names(TABLE, INFOS)}
    assert set(slices) == {*foreign(), "head.weight"}
    assert (slices["h.1.q.weight"].path, slices["h.1.q.weight"].layer) == ("layers.query.weight", 1)
    assert {n for n, s in slices.items() if s.is_alias} == {"embed.weight"}
    assert {n for n, s in slices.items() if s.is_buffer} == {"fb", "h.0.seen", "h.1.seen"}


def test_prefixed_tables_compose():
    table = TABLE.prefixed(source="a.", target="x.") + TABLE.prefixed(source="b.c.", target="y.")
    infos = {f"{p}{path}": i for p in ("x.", "y.") for path, i in INFOS.items()}
    tensors = {f"{p}{name}": x for p in ("a.", "b.c.") for name, x in foreign().items()}
    rotary = {"b.c.h.0.rotary": np.zeros(1)}
    variables = load(memory_source({**tensors, **rotary}), table, infos)
    assert_same_bits(export(variables, table), tensors)
    refused({**tensors, "bxc.h.0.rotary": np.zeros(1)}, "bxc", table, infos)


def test_export_needs_the_variables_of_the_table():
    variables = load(memory_source(foreign()), TABLE, INFOS)
    with pytest.raises(ConversionError, match="extra"):
        export({**variables, "extra": np.zeros(1)}, TABLE)
    del variables["filterbank"]
    with pytest.raises(ConversionError, match="filterbank"):
        export(variables, TABLE)


def layout_of(sharding, dtypes=None):
    return {
        path: jax.ShapeDtypeStruct(
            info.shape,
            (dtypes or {}).get(path, info.dtype),
            sharding=sharding.named(info.axes, info.shape),
        )
        for path, info in INFOS.items()
    }


def test_sharded_loading_equals_loading_on_the_host():
    sharding = make_sharding(fsdp=4, tensor=2)
    tensors = foreign(ml_dtypes.bfloat16)
    on_host = load(memory_source(tensors), TABLE, INFOS)
    layout = layout_of(sharding, {path: value.dtype for path, value in on_host.items()})
    placed = load(memory_source(tensors), TABLE, INFOS, onto(layout))
    weight = placed["layers.query.weight"]
    assert weight.sharding == sharding.named(INFOS["layers.query.weight"].axes, weight.shape)
    assert weight.addressable_shards[0].data.shape == (2, 1, 4)
    assert_same_bits({path: np.asarray(x) for path, x in placed.items()}, on_host)


def test_each_device_reads_only_its_part():
    source, largest = memory_source(foreign()), {}

    def fetch(name, index):
        part = source.read(name, index)
        largest[name] = max(largest.get(name, 0), part.size)
        return part

    layout = layout_of(make_sharding(fsdp=4, tensor=2))
    load(LazySource(source.infos, fetch), TABLE, INFOS, onto(layout))
    assert largest["h.0.q.weight"] == 8 * 4 // 8
    assert largest["embed.weight"] == 16 * 4 // 8


@given(
    x=hnp.arrays(np.float32, st.tuples(*[st.integers(1, 4)] * 2)),
    axes=st.sets(st.integers(0, 3), max_size=2).map(lambda s: tuple(sorted(s))),
    data=st.data(),
)
def test_part_of_squeezed_is_squeezed_part(x, axes, data):
    axes = tuple(axis for axis in axes if axis < x.ndim + len(axes))
    squeeze = Squeeze(axes)
    stored = squeeze.store(x)
    index = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in x.shape
    )
    np.testing.assert_array_equal(squeeze.load(stored), x)
    np.testing.assert_array_equal(squeeze.load(stored[squeeze.index(index)]), x[index])


@given(
    x=hnp.arrays(np.float32, st.tuples(*[st.integers(1, 4)] * 3)),
    axes=st.permutations(range(3)),
    data=st.data(),
)
def test_part_of_permuted_is_permuted_part(x, axes, data):
    permute = Permute(tuple(axes))
    stored = permute.store(x)
    assert permute.info(TensorInfo(stored.shape, stored.dtype)).shape == x.shape
    index = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))) for n in x.shape
    )
    np.testing.assert_array_equal(permute.load(stored), x)
    np.testing.assert_array_equal(permute.load(stored[permute.index(index)]), x[index])
