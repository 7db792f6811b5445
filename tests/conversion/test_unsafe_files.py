"""Hostile files are refused by name, and nothing in them runs."""

import contextlib
import gzip
import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from speechlm2_jax.conversion.errors import ConversionError, UnsafeFileError
from speechlm2_jax.conversion.readers import open_weights, read_nemo
from speechlm2_jax.conversion.readers.tar import Inflation, read_tar
from speechlm2_jax.conversion.readers.torch_files import torch_source
from speechlm2_jax.conversion.readers.yaml_text import read_yaml

DATA = Path(__file__).parents[1] / "data"
CONFIG = b"sample_rate: 16000\n"


class _Runs:
    """Pickles as a call: what an attacker would put into a checkpoint."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def torch_zip(pickled: bytes) -> bytes:
    """A zip archive as torch.save makes it, around any pickle."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name: str, data: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = ""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info, data if kind == tarfile.REGTYPE else b""


def nemo_file(path: Path, weights: bytes, config: bytes = CONFIG) -> Path:
    path.write_bytes(
        tar_of(member("model_config.yaml", config), member("model_weights.ckpt", weights))
    )
    return path


EVIL = {
    "os.system": lambda marker: _Runs(os.system, f"touch {marker}"),
    "eval": lambda marker: _Runs(eval, f"open({str(marker)!r}, 'w')"),
    "exec": lambda marker: _Runs(exec, f"open({str(marker)!r}, 'w')"),
    "open": lambda marker: _Runs(open, str(marker), "w"),
    "Path.touch": lambda marker: _Runs(Path.touch, marker),
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("container", ["nemo", "ckpt", "bin", "legacy"])
def test_evil_pickle_is_refused_and_nothing_runs(tmp_path, container, name, protocol):
    marker = tmp_path / "marker"
    pickled = pickle.dumps({"state_dict": {}, "extra": EVIL[name](marker)}, protocol=protocol)
    path = tmp_path / f"model.{'bin' if container == 'legacy' else container}"
    if container == "nemo":
        nemo_file(path, torch_zip(pickled))
    else:
        path.write_bytes(pickled if container == "legacy" else torch_zip(pickled))
    with pytest.raises(UnsafeFileError):
        open_weights(path)
    assert not marker.exists()


def test_refusal_names_the_global(tmp_path):
    path = nemo_file(tmp_path / "evil.nemo", torch_zip(pickle.dumps(_Runs(eval, "1"), protocol=2)))
    with pytest.raises(UnsafeFileError, match=r"(__builtin__|builtins)\.eval"):
        open_weights(path)


ALLOWED_THEN_EVAL = b"""\x80\x02ccollections
OrderedDict
)R(X\x01\x00\x00\x00wctorch._utils
_rebuild_tensor_v2
0cbuiltins
eval
(X\x05\x00\x00\x001 + 1tRu."""


def test_eval_among_allowed_names_is_refused(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(torch_zip(ALLOWED_THEN_EVAL))
    with pytest.raises(UnsafeFileError, match=r"builtins\.eval"):
        open_weights(path)


@pytest.mark.parametrize(
    "body",
    [
        b"cpathlib\nPosixPath\n(X\x01\x00\x00\x00xtR.",  # a call of a recorded class stays a record
        b"cbuiltins\nlist\n)R.",
    ],
)
def test_known_harmless_classes_become_records_and_are_not_weights(tmp_path, body):
    path = tmp_path / "model.bin"
    path.write_bytes(torch_zip(b"\x80\x02" + body))
    with pytest.raises(ConversionError, match="no dictionary of tensors"):
        open_weights(path)


@pytest.mark.parametrize(
    "body",
    [
        b"X\x01\x00\x00\x00a)R.",  # calls a string
        b"ctorch\nfloat32\n)R.",  # calls a dtype
        b"ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",  # patches one of our functions
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x02K\x03K\x04tR.",  # no storage
        b"X\x01\x00\x00\x00aQ.",  # a reference that is no storage
        b"\x82\x01.",  # an extension code
        b"cbuiltins\ngetattr\n.",
        b"cnumpy\nload\n.",
        b"}((((ttttK\x01s.",  # a nested tuple as a key
    ],
)
def test_operations_beyond_data_are_refused(tmp_path, body):
    path = tmp_path / "model.bin"
    path.write_bytes(torch_zip(b"\x80\x02" + body))
    with pytest.raises(UnsafeFileError):
        open_weights(path)


def test_claimed_lengths_ask_for_no_memory(tmp_path):
    path = tmp_path / "model.bin"
    for size in (2**62, 2**34):
        path.write_bytes(b"\x80\x04\x8e" + struct.pack("<Q", size) + b"x" * 100)
        with pytest.raises(ConversionError):
            open_weights(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 1 << 24  # KiB


@pytest.mark.parametrize("cut", [0, 1, 100, 2000, 20000, 150_000])
@pytest.mark.parametrize("name", ["qwen3_lora.ckpt", "asr.nemo", "qwen3_lora_hf/model.safetensors"])
def test_damaged_files_are_refused(tmp_path, name, cut):
    path = tmp_path / Path(name).name
    path.write_bytes((DATA / "salm" / name).read_bytes()[:cut])
    with pytest.raises(ConversionError):
        source = open_weights(path)
        for tensor in source.infos:
            source.read(tensor)


def test_changed_weights_fail_their_checksum(tmp_path):
    content = bytearray((DATA / "salm/qwen3_lora.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match="checksum"):
        source = open_weights(path)
        for tensor in source.infos:
            source.read(tensor)


HOSTILE_MEMBERS = {
    "absolute": [member("/tmp/evil")],
    "parent": [member("../evil")],
    "inner parent": [member("a/../../evil")],
    "backslash": [member("..\\evil")],
    "symlink and write through": [
        member("dir", kind=tarfile.SYMTYPE, link="/tmp"),
        member("dir/evil"),
    ],
    "hard link": [member("evil", kind=tarfile.LNKTYPE, link="/etc/passwd")],
    "character device": [member("evil", kind=tarfile.CHRTYPE)],
    "block device": [member("evil", kind=tarfile.BLKTYPE)],
    "pipe": [member("evil", kind=tarfile.FIFOTYPE)],
    "two of one name": [member("a"), member("a")],
    "two of one name, spelt apart": [member("a"), member("./a")],
    "GNU sparse": [member("evil", kind=tarfile.GNUTYPE_SPARSE)],
}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("name", HOSTILE_MEMBERS)
def test_hostile_tar_member_is_refused(tmp_path, name, compress):
    content = tar_of(*HOSTILE_MEMBERS[name], member("model_config.yaml", CONFIG))
    path = tmp_path / "evil.nemo"
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(UnsafeFileError):
        read_nemo(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.nemo"]


def _pax(records: dict[str, str]) -> bytes:
    info = tarfile.TarInfo("a")
    info.pax_headers = records
    return info.tobuf(tarfile.PAX_FORMAT) + bytes(1024)


@pytest.mark.parametrize(
    "records",
    [
        {"path": "/etc/evil"},
        {"path": "../evil"},
        {"GNU.sparse.major": "1", "GNU.sparse.realsize": str(10 << 30)},
        {"size": str(10 << 30)},
        {"size": "-1"},
        {"comment": "x" * (2 << 20)},
    ],
)
def test_hostile_extended_header_is_refused(records):
    with pytest.raises(UnsafeFileError):
        read_tar(memoryview(_pax(records)))


def test_sparse_file_of_ten_gigabytes_is_refused():
    info = tarfile.TarInfo("model_weights.ckpt")
    info.size = 10 << 30
    with pytest.raises(UnsafeFileError, match="10737418240 bytes"):
        read_tar(memoryview(info.tobuf() + bytes(1024)))


def test_gzip_bomb_is_stopped_at_its_limit():
    bomb = gzip.compress(tar_of(member("model_weights.ckpt", bytes(8 << 20))))
    assert len(bomb) < 1 << 16
    with pytest.raises(UnsafeFileError, match="expands to more than"):
        read_tar(memoryview(bomb), Inflation(ratio=50, floor=1 << 20))
    assert len(read_tar(memoryview(bomb))["model_weights.ckpt"]) == 8 << 20


def test_default_gzip_limit_bounds_a_large_bomb():
    layer = gzip.compress(bytes(80 << 20))
    with pytest.raises(UnsafeFileError, match="expands to more than"):
        read_tar(memoryview(layer))


@pytest.mark.parametrize("value", ["0", "1"])
def test_torch_environment_switch_changes_nothing(tmp_path, monkeypatch, value):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", value)
    test_evil_pickle_is_refused_and_nothing_runs(tmp_path, "nemo", "os.system", 2)


BILLION_LAUGHS = b"a0: &a0 [x, x]\n" + b"".join(
    b"a%d: &a%d [*a%d, *a%d]\n" % (i, i, i - 1, i - 1) for i in range(1, 40)
)


@pytest.mark.parametrize(
    "text",
    [
        BILLION_LAUGHS,
        b"a: !!python/object/apply:os.system ['touch marker']\n",
        b"a: !!python/name:os.system\n",
        b"a: &a [*a]\n",
        b"a: " + b"x" * (1 << 20),
    ],
)
def test_hostile_yaml_is_refused(tmp_path, text):
    start = time.monotonic()
    with pytest.raises(UnsafeFileError):
        read_nemo(nemo_file(tmp_path / "evil.nemo", b"", config=text))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("text", [b"[" * 2000, b"a: [", b"- 1\n", b"", b"\xff\xfe\x00"])
def test_yaml_that_is_no_mapping_is_refused(text):
    with pytest.raises(ConversionError):
        read_yaml(text, "model_config.yaml")


def test_yaml_aliases_of_modest_size_are_read():
    assert read_yaml(b"a: &a [1, 2]\nb: *a\n", "x") == {"a": [1, 2], "b": [1, 2]}


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 1 << 40, 10])
def test_absurd_safetensors_header_is_refused(tmp_path, length):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(100))
    with pytest.raises(ConversionError, match=r"model\.safetensors"):
        open_weights(path)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.py"]
)
def test_shard_index_cannot_leave_its_directory(tmp_path, shard):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ConversionError, match="beside the index"):
        open_weights(tmp_path)


MUTATED = {
    "asr.nemo": lambda content: read_tar(memoryview(content)),
    "qwen3_lora.ckpt": lambda content: _read_all(torch_source(memoryview(content), "x")),
}


def _read_all(source) -> None:
    for name in source.infos:
        source.read(name)


@pytest.mark.parametrize("name", MUTATED)
def test_random_damage_is_never_worse_than_refused(name):
    content = (DATA / "salm" / name).read_bytes()
    for seed in range(60):
        draw = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(4000)] = draw.randrange(256)
        with contextlib.suppress(ConversionError):
            MUTATED[name](bytes(damaged))
