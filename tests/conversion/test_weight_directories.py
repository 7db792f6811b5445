"""Directories and shards of weights are opened as one source, whatever the format."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import open_weights, write_safetensors

DATA = Path(__file__).parents[1] / "data"
TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "n": np.array(7, np.int64),
}


def write_shards(directory: Path, weight_map: dict[str, str] | None = None) -> None:
    write_safetensors(directory / "model-1.safetensors", {"a": TENSORS["a"]}, {"c": "a"})
    write_safetensors(directory / "model-2.safetensors", {k: TENSORS[k] for k in "bn"})
    places = {"a": "model-1.safetensors", "b": "model-2.safetensors", "n": "model-2.safetensors"}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map or places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_written_tensors_are_read_back_bit_for_bit(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TENSORS, {"c": "a", "format": "pt"})
    source = open_weights(tmp_path)
    assert source.aliases == {"c": "a"}
    for name, x in TENSORS.items():
        assert source.read(name).dtype == x.dtype == source.infos[name].dtype
        assert source.read(name).tobytes() == x.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_parts_are_read(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", TENSORS)
    source = open_weights(tmp_path)
    part = (slice(1, 3), slice(0, 2))
    np.testing.assert_array_equal(source.read("a", part), TENSORS["a"][part])
    np.testing.assert_array_equal(source.read("b", (slice(0, 1), slice(None))), TENSORS["b"][:1])
    assert source.read("n", ()) == 7


def test_views_are_written_as_they_look(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"a": TENSORS["a"].T})
    np.testing.assert_array_equal(open_weights(tmp_path).read("a"), TENSORS["a"].T)


def test_shards_are_one_source(tmp_path):
    write_shards(tmp_path)
    source = open_weights(tmp_path)
    assert set(source.infos) == set(TENSORS)
    assert source.aliases == {"c": "a"}
    for name, x in TENSORS.items():
        assert source.read(name).tobytes() == x.tobytes()


@pytest.mark.parametrize(
    "weight_map",
    [
        {"a": "model-1.safetensors"},  # the index leaves tensors of the second shard out
        {"a": "model-2.safetensors", "b": "model-2.safetensors", "n": "model-2.safetensors"},
        {"a": "model-1.safetensors", "b": "model-3.safetensors", "n": "model-2.safetensors"},
    ],
)
def test_index_and_shards_must_agree(tmp_path, weight_map):
    write_shards(tmp_path, weight_map)
    if weight_map == {"a": "model-1.safetensors"}:
        write_safetensors(tmp_path / "model-1.safetensors", TENSORS)
    with pytest.raises(ConversionError, match="shards do not hold|model-3"):
        open_weights(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, TENSORS)
    before = path.read_bytes()
    with pytest.raises(Exception, match="object"):
        write_safetensors(path, {"a": np.array([None])})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_directory_without_weights_names_what_is_expected(tmp_path):
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        open_weights(tmp_path)
    with pytest.raises(ConversionError, match="does not exist"):
        open_weights(tmp_path / "missing.safetensors")


def test_hugging_face_goldens_are_read():
    assert len(open_weights(DATA / "llm/llama").infos) == 21
