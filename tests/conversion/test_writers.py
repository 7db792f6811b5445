"""What we write without torch is what torch.save and NeMo's save_to would have meant."""

import gzip
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import open_weights, read_nemo
from speechlm2_jax.conversion.writers import write_nemo, write_torch_file
from tests.conversion.goldens import SALM, assert_same_bits, tensors
from tests.conversion.test_torch_files import bits

REPOSITORY = Path(__file__).parents[2]
DTYPES = (
    np.float64,
    np.float32,
    np.float16,
    ml_dtypes.bfloat16,
    np.int64,
    np.int32,
    np.int16,
    np.int8,
    np.uint8,
    np.bool_,
    np.complex64,
)
FILES = {"a_tokenizer.model": b"\0\1\2", "b_vocab.txt": "▁the\n".encode()}
CONFIG = {
    "sample_rate": 16000,
    "tokenizer": {"model_path": "nemo:a_tokenizer.model", "vocab_path": "nemo:b_vocab.txt"},
    "decoder": {"vocabulary": ["n", "y", "▁the", "1e-5", ""], "dropout": 1e-5, "feat_out": -1},
    "train_ds": None,
    "att_context_size": (-1, -1),
}


def arrays_of_every_kind() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(6, 8)).astype(np.float32)
    return {
        "matrix": rng.normal(size=(3, 4)).astype(np.float32),
        "cube": rng.normal(size=(2, 3, 5)).astype(np.float32),
        "transposed": wide.T,
        "strided": wide[1:4, ::3],
        "empty": np.zeros((0, 3), np.float32),
        "empty.inside": np.zeros((2, 0, 3), np.float32),
        "scalar": np.array(3, np.int64),
        "half.scalar": np.array(0.5, ml_dtypes.bfloat16),
        "special": np.array([np.nan, -0.0, np.inf, -np.inf, 1e-45], np.float32),
        "ümlaut.▁": np.ones(1, np.float32),
        **{np.dtype(t).name: np.array([0, 1, 2, 127]).astype(t) for t in DTYPES},
    }


def test_torch_reads_the_tensors_bit_for_bit_in_order(tmp_path):
    path, arrays = tmp_path / "model.ckpt", arrays_of_every_kind()
    write_torch_file(path, arrays)
    for options in ({"weights_only": True}, {"weights_only": False}, {"mmap": True}):
        state = torch.load(path, **options)
        assert type(state) is OrderedDict
        assert list(state) == list(arrays)
        for name, array in arrays.items():
            assert state[name].shape == array.shape
            assert state[name].dtype == getattr(torch, array.dtype.name.replace("bool_", "bool"))
            assert state[name].is_contiguous()
            assert not state[name].requires_grad
            np.testing.assert_array_equal(bits(state[name]), bits(array), err_msg=name)


def test_our_reader_reads_the_tensors_bit_for_bit(tmp_path):
    path, arrays = tmp_path / "model.ckpt", arrays_of_every_kind()
    write_torch_file(path, arrays)
    assert_same_bits(tensors(open_weights(path)), arrays)


def test_written_strides_are_those_of_torch(tmp_path):
    path, arrays = tmp_path / "model.ckpt", arrays_of_every_kind()
    write_torch_file(path, arrays)
    for name, tensor in torch.load(path, weights_only=True).items():
        assert tensor.stride() == torch.empty(arrays[name].shape).stride(), name


def test_one_array_under_two_names_is_one_storage(tmp_path):
    path, shared = tmp_path / "model.ckpt", np.ones((300, 300), np.float32)
    write_torch_file(path, {"b": shared, "a": shared, "equal": shared.copy()})
    assert path.stat().st_size < 2.1 * shared.nbytes
    state = torch.load(path, weights_only=True)
    assert state["a"].data_ptr() == state["b"].data_ptr() != state["equal"].data_ptr()
    assert open_weights(path).aliases == {"b": "a"}


def test_every_member_is_stored_plain_and_aligned(tmp_path):
    path = tmp_path / "model.ckpt"
    write_torch_file(path, arrays_of_every_kind())
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
            head = content[info.header_offset : info.header_offset + 30]
            start = info.header_offset + 30 + int.from_bytes(head[26:28], "little")
            start += int.from_bytes(head[28:30], "little")
            assert start % 64 == 0, info.filename
            assert content[start : start + info.file_size] == archive.read(info)


def test_elements_beyond_31_bits_are_written_as_torch_counts_them():
    import io
    import pickletools

    from speechlm2_jax.conversion.writers.pickle_text import ordered_dict, tensor

    shape = (3, 1 << 31)
    pickled = ordered_dict([("big", tensor("FloatStorage", "0", shape))])
    found = [value for _, value, _ in pickletools.genops(io.BytesIO(pickled)) if value is not None]
    assert [v for v in found if type(v) is int] == [2, 3 << 31, 0, 3, 1 << 31, 1 << 31, 1]


@pytest.mark.parametrize("compressed", [False, True])
def test_equal_tensors_give_equal_bytes(tmp_path, monkeypatch, compressed):
    for name, files, now in (("one", FILES, 1e9), ("another", dict(reversed(FILES.items())), 2e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        path = tmp_path / f"{name}.nemo"
        write_nemo(path, CONFIG, arrays_of_every_kind(), files, compressed=compressed)
    assert (tmp_path / "one.nemo").read_bytes() == (tmp_path / "another.nemo").read_bytes()


def test_a_compressed_nemo_file_has_the_same_tar_inside(tmp_path):
    plain, small = tmp_path / "plain.nemo", tmp_path / "small.nemo"
    write_nemo(plain, CONFIG, arrays_of_every_kind(), FILES)
    write_nemo(small, CONFIG, arrays_of_every_kind(), FILES, compressed=True)
    assert gzip.decompress(small.read_bytes()) == plain.read_bytes()
    assert small.stat().st_size < plain.stat().st_size / 2  # the members' padding alone
    with tarfile.open(small, "r:gz") as tar:  # what NeMo falls back to
        assert "./model_weights.ckpt" in tar.getnames()


def test_nemo_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "new/asr.nemo"
    write_nemo(path, CONFIG, arrays_of_every_kind(), FILES)
    archive = read_nemo(path)
    assert archive.config == {**CONFIG, "att_context_size": [-1, -1]}
    assert_same_bits(tensors(archive.weights), arrays_of_every_kind())
    assert archive.artifact("nemo:a_tokenizer.model") == FILES["a_tokenizer.model"]
    assert archive.artifact("b_vocab.txt") == FILES["b_vocab.txt"]
    assert [entry.name for entry in path.parent.iterdir()] == ["asr.nemo"]
    with tarfile.open(path) as tar:
        for member in tar.getmembers():
            assert member.isfile()
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert member.name.startswith("./")


def test_a_nemo_file_of_nemo_comes_back(tmp_path):
    original = read_nemo(SALM / "asr.nemo")
    files = {n: original.artifact(n) for n in original.members if n.split("_")[0] != "model"}
    write_nemo(tmp_path / "asr.nemo", original.config, tensors(original.weights), files)
    copy = read_nemo(tmp_path / "asr.nemo")
    assert copy.config == original.config
    assert copy.members.keys() == original.members.keys()
    assert_same_bits(tensors(copy.weights), tensors(original.weights))


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path, old = tmp_path / "asr.nemo", {"w": np.ones(2, np.float32)}
    write_nemo(path, {}, old, {})
    with pytest.raises(ConversionError, match=r"v is uint32; torch files hold .*bfloat16"):
        write_nemo(path, {}, {"v": np.ones(2, np.uint32)}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["asr.nemo"]
    assert_same_bits(tensors(read_nemo(path).weights), old)


@pytest.mark.parametrize(
    ("config", "files", "message"),
    [
        ({"a": ["nemo:b_vocab.tx"]}, FILES, r"not given: b_vocab\.tx \(nearest: b_vocab\.txt\)"),
        ({}, {"../x": b""}, r"\.\./x"),
        ({}, {"model_config.yaml": b""}, "model_config"),
        ({"rate": np.float32(1)}, {}, "not plain"),
    ],
)
def test_what_cannot_be_read_back_is_refused(tmp_path, config, files, message):
    with pytest.raises(ConversionError, match=message):
        write_nemo(tmp_path / "asr.nemo", config, {}, files)
    assert not list(tmp_path.iterdir())


def test_torch_is_not_imported_by_the_writers():
    code = "import sys, speechlm2_jax.conversion.writers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0
