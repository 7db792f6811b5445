"""torch's distributed checkpoints give the tensors that were saved; hostile ones are refused."""

import contextlib
import os
import pickle
import random
import shutil
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as records

import speechlm2_jax as slm
from convert import main
from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.readers import open_weights
from speechlm2_jax.pretrained import registry
from speechlm2_jax.settings import SettingsError
from tests.conversion.goldens import DATA, SALM, assert_same_bits, tensors

FOUR_RANKS = DATA / "conversion/distributed"
"""Rows, columns, a grid, a replicated tensor and others, saved by four processes."""


def save(state: dict[str, Any], folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(state, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(FOUR_RANKS, tmp_path / "checkpoint"))


def edit(folder: Path, change: Any) -> None:
    """Changes the records of `.metadata` with torch's own classes."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(content) or content))


def test_chunks_of_four_processes_are_assembled():
    source = open_weights(FOUR_RANKS)
    assert_same_bits(tensors(source), tensors(open_weights(f"{FOUR_RANKS}.safetensors")))


@pytest.mark.parametrize("part", [(slice(1, 5), slice(2, 4)), (slice(0, 6, 2), slice(4, 5))])
def test_a_part_is_read_across_chunks(part):
    source, whole = open_weights(FOUR_RANKS), open_weights(f"{FOUR_RANKS}.safetensors").read("grid")
    np.testing.assert_array_equal(source.read("grid", part), whole[part])


def test_a_part_opens_only_the_chunks_that_it_touches(folder):
    other = folder / "__3_0.distcp"
    other.write_bytes(bytes(other.stat().st_size))
    source = open_weights(folder)
    part = (slice(0, 4), slice(0, 3))
    whole = open_weights(f"{FOUR_RANKS}.safetensors").read("grid")
    np.testing.assert_array_equal(source.read("grid", part), whole[part])
    with pytest.raises(ConversionError, match="__3_0.distcp: grid"):
        source.read("grid")


def test_every_dtype_and_layout_is_read(tmp_path):
    torch.manual_seed(0)
    kinds = "float64 float16 bfloat16 float8_e4m3fn int64 int32 int16 int8 uint8 bool complex64"
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        **{kind: torch.arange(4).to(getattr(torch, kind)) for kind in kinds.split()},
        "transposed": base.T,
        "strided": base[1:3, ::3],
        "expanded": torch.ones(1).expand(3, 2),
    }
    source = open_weights(save(state, tmp_path / "checkpoint"))
    for name, tensor in state.items():
        read = source.read(name)
        assert str(tensor.dtype) == f"torch.{read.dtype}" and read.shape == tuple(tensor.shape)
        bytes_of = tensor.contiguous().view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.ravel(read).view(np.uint8), np.ravel(bytes_of))


def lightning(path: Path) -> Path:
    """The folder that Lightning's ModelParallelStrategy makes of the golden `.ckpt`."""
    whole = torch.load(SALM / "qwen3_lora.ckpt", weights_only=True)
    weights = whole.pop("state_dict")
    optimizer = {"state": {"proj": {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3}]}
    save({"state_dict": weights, "optimizer_0": optimizer}, path)
    torch.save(whole, path / "meta.pt")
    return path


def test_a_lightning_folder_is_the_model_of_its_ckpt(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(SALM)
    path = lightning(tmp_path / "step=2.ckpt")
    kind = registry.identify(path)
    assert kind is not None and kind.classes == ("SALM",)
    ours = slm.models.SALM.from_pretrained(path)
    theirs = slm.models.SALM.from_pretrained("qwen3_lora.ckpt")
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    assert main([str(path), str(tmp_path / "out")]) == 0
    theirs.save_pretrained(tmp_path / "library")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "library/model.safetensors"
    ).read_bytes()
    capsys.readouterr()


def test_without_hyper_parameters_the_error_tells_what_to_copy(folder, tmp_path, capsys):
    assert registry.identify(folder) == registry.DISTRIBUTED_ALONE
    with pytest.raises(SettingsError, match="copy the config.json of its model into it"):
        slm.models.SALM.from_pretrained(folder)
    assert main([str(folder), str(tmp_path / "out")]) == 0
    assert_same_bits(tensors(open_weights(tmp_path / "out")), tensors(open_weights(folder)))
    capsys.readouterr()


def test_entries_that_are_no_tensors_are_named(tmp_path):
    with pytest.raises(ConversionError, match="no tensors: version"):
        open_weights(save({"weight": torch.ones(1), "version": 3}, tmp_path / "checkpoint"))


def chunks_of(metadata: records.Metadata, name: str) -> list[records.ChunkStorageMetadata]:
    entry = metadata.state_dict_metadata[f"state_dict.{name}"]
    assert isinstance(entry, records.TensorStorageMetadata)
    return entry.chunks


def without_a_chunk(metadata: Any) -> None:
    chunks_of(metadata, "grid").pop()


def with_a_chunk_twice(metadata: Any) -> None:
    chunks_of(metadata, "grid").append(chunks_of(metadata, "grid")[0])


def with_an_overlap(metadata: Any) -> None:
    chunks_of(metadata, "columns")[0].sizes = torch.Size([4, 3])


def with_a_shape_of_its_own(metadata: Any) -> None:
    chunks_of(metadata, "whole")[0].sizes = torch.Size([2])
    metadata.state_dict_metadata["state_dict.whole"].size = torch.Size([2])


def of_another_dtype(metadata: Any) -> None:
    metadata.state_dict_metadata["state_dict.whole"].properties.dtype = torch.int32


def larger_than_stored(metadata: Any) -> None:
    chunks_of(metadata, "whole")[0].sizes = torch.Size([1 << 40])
    metadata.state_dict_metadata["state_dict.whole"].size = torch.Size([1 << 40])


def place_of(metadata: Any, name: str) -> Any:
    return next(p for i, p in metadata.storage_data.items() if i.fqn == f"state_dict.{name}")


def compressed(metadata: Any) -> None:
    place_of(metadata, "whole").transform_descriptors = ["stream.zstd/1"]


def outside(metadata: Any) -> None:
    place_of(metadata, "whole").relative_path = "../secret.distcp"


def absolute(metadata: Any) -> None:
    place_of(metadata, "whole").relative_path = "/etc/passwd"


def before_the_file(metadata: Any) -> None:
    place_of(metadata, "whole").offset = -4


def behind_the_file(metadata: Any) -> None:
    place_of(metadata, "whole").offset = 1 << 40


def of_another_tensor(metadata: Any) -> None:
    metadata.storage_data = {
        i: place_of(metadata, "scalar") if i.fqn == "state_dict.whole" else p
        for i, p in metadata.storage_data.items()
    }


def nowhere(metadata: Any) -> None:
    metadata.storage_data = {}


def of_no_kind(metadata: Any) -> Any:
    return [metadata]


CHANGES = {
    without_a_chunk: "grid: its chunks do not fill",
    with_a_chunk_twice: "grid: its chunks do not fill",
    with_an_overlap: "columns: its chunks do not fill",
    with_a_shape_of_its_own: r"whole: .metadata gives .*\[2\] .* has \[3\]",
    of_another_dtype: "whole: .metadata gives .* int32",
    larger_than_stored: "whole: a chunk has more bytes than are stored",
    compressed: r"whole: .*stream\.zstd",
    outside: "whole: .*no file of the folder",
    absolute: "whole: .*no file of the folder",
    before_the_file: "not a count",
    behind_the_file: "cut short",
    of_another_tensor: "whole",
    nowhere: "is not stored",
    of_no_kind: "no Metadata",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_records_that_do_not_fit_are_refused(change, folder):
    edit(folder, change)
    with pytest.raises(ConversionError, match=CHANGES[change]) as error:
        open_weights(folder).read("whole")
    assert str(folder) in str(error.value)


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp"])
def test_code_in_a_pickle_is_refused_and_not_run(name, folder, tmp_path):
    marker = tmp_path / "marker"
    if name == ".metadata":
        edit(folder, lambda metadata: setattr(metadata, "planner_data", Evil(marker)))
    else:
        content = (folder / name).read_bytes()
        torch.save(Evil(marker), folder / "evil")
        evil = (folder / "evil").read_bytes()
        (folder / name).write_bytes(content + evil)

        def moved(metadata: Any) -> None:
            place = place_of(metadata, "whole")
            place.offset, place.length = len(content), len(evil)

        edit(folder, moved)
    with pytest.raises(UnsafeFileError, match=r"posix\.system|nt\.system"):
        open_weights(folder).read("whole")
    assert not marker.exists()


def test_a_file_that_is_missing_or_cut_short_is_named(folder):
    last = folder / "__0_0.distcp"
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(ConversionError, match="__0_0.distcp is cut short"):
        open_weights(folder)
    last.unlink()
    with pytest.raises(ConversionError, match="__0_0.distcp cannot be read"):
        open_weights(folder)


def test_many_crossing_chunks_are_refused_quickly(folder):
    def pinwheels(metadata: Any) -> None:
        """Chunks that no cut divides, as no way of sharding makes them."""
        size = torch.Size([4, 4096])
        chunks = [
            records.ChunkStorageMetadata(torch.Size([i % 4, i]), torch.Size([1, 2]))
            for i in range(4095)
        ]
        metadata.state_dict_metadata["state_dict.whole"].size = size
        metadata.state_dict_metadata["state_dict.whole"].chunks = chunks
        place = place_of(metadata, "whole")
        for chunk in chunks:
            index = records.MetadataIndex("state_dict.whole", chunk.offsets)
            metadata.storage_data[index] = place

    edit(folder, pinwheels)
    began = time.monotonic()
    with pytest.raises(ConversionError, match="do not fill"):
        open_weights(folder)
    assert time.monotonic() - began < 5


def test_random_damage_is_never_worse_than_refused(folder):
    content = (folder / ".metadata").read_bytes()
    for seed in range(60):
        draw = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(content))] = draw.randrange(256)
        (folder / ".metadata").write_bytes(bytes(damaged))
        with contextlib.suppress(ConversionError):
            tensors(open_weights(folder))
