"""The restricted reader gives the tensors that torch.load gives, for every way of saving them."""

import argparse
import datetime
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers import open_weights, read_nemo
from speechlm2_jax.conversion.readers.buffers import map_file
from speechlm2_jax.conversion.readers.torch_files import read_hyper_parameters, read_torch_object

DATA = Path(__file__).parents[1] / "data/salm"


def bits(x) -> np.ndarray:
    """The bytes of a NumPy array or torch tensor, so that NaN and bf16 compare too."""
    if isinstance(x, torch.Tensor):
        x = x.detach().clone().contiguous()
        x = (x.reshape(-1).view(torch.uint8) if x.numel() else x.to(torch.uint8)).numpy()
    return np.frombuffer(x.tobytes(), np.uint8)


def tensors_of_every_kind() -> dict[str, "torch.Tensor"]:
    torch.manual_seed(0)
    base = torch.randn(10, 12)
    return {
        "plain": torch.randn(3, 4),
        "transposed": torch.arange(24.0).reshape(4, 6).T,
        "strided": base[2:5, ::3],
        "column": base[:, 1],
        "offset": base[7],
        "expanded": torch.ones(1).expand(5, 4),
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        **{
            str(dtype): torch.tensor([0, 1, 2, 3]).to(dtype)
            for dtype in (
                torch.float64,
                torch.float16,
                torch.bfloat16,
                torch.float8_e4m3fn,
                torch.float8_e5m2,
                torch.int64,
                torch.int32,
                torch.int16,
                torch.int8,
                torch.uint8,
                torch.uint16,
                torch.bool,
                torch.complex64,
            )
        },
    }


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_what_torch_saved(tmp_path, new_format, protocol):
    path, tensors = tmp_path / "model.bin", tensors_of_every_kind()
    torch.save(tensors, path, pickle_protocol=protocol, _use_new_zipfile_serialization=new_format)
    source = open_weights(path)
    assert set(source.infos) == set(tensors)
    for name, tensor in tensors.items():
        read = source.read(name)
        assert read.shape == tuple(tensor.shape) == source.infos[name].shape
        assert str(tensor.dtype) == f"torch.{read.dtype}" == f"torch.{source.infos[name].dtype}"
        np.testing.assert_array_equal(bits(read), bits(tensor), err_msg=name)


def test_parts_of_tensors_are_read(tmp_path):
    path, tensors = tmp_path / "model.bin", tensors_of_every_kind()
    torch.save(tensors, path)
    source = open_weights(path)
    for name in ("plain", "transposed", "strided", "expanded"):
        part = source.read(name, (slice(1, 3), slice(0, 2)))
        np.testing.assert_array_equal(bits(part), bits(tensors[name][1:3, 0:2]), err_msg=name)


def test_tensors_of_one_storage_are_read_from_it_and_equal_ones_are_aliases(tmp_path):
    path, base = tmp_path / "model.bin", torch.randn(1000, 100)
    torch.save({"b": base, "a": base, "c": base.T, "d": base[500:]}, path)
    assert path.stat().st_size < 1.1 * base.numel() * 4
    source = open_weights(path)
    assert set(source.infos) == {"a", "c", "d"}
    assert source.aliases == {"b": "a"}
    np.testing.assert_array_equal(source.read("a"), base.numpy())
    np.testing.assert_array_equal(source.read("b"), base.numpy())
    np.testing.assert_array_equal(source.read("c"), base.numpy().T)
    np.testing.assert_array_equal(source.read("d"), base.numpy()[500:])


def test_goldens_equal_torch_load():
    reference = torch.load(DATA / "qwen3_lora.ckpt", weights_only=True)["state_dict"]
    source = open_weights(DATA / "qwen3_lora.ckpt")
    assert set(source.infos) | set(source.aliases) == set(reference)
    for name, tensor in reference.items():
        np.testing.assert_array_equal(bits(source.read(name)), bits(tensor), err_msg=name)


def test_what_lightning_keeps_beside_the_weights_does_not_disturb(tmp_path):
    path = tmp_path / "last.ckpt"
    weight = torch.randn(2, 2)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(weight.clone())])
    checkpoint = {
        "state_dict": {"weight": weight},
        "optimizer_states": [optimizer.state_dict()],
        "callbacks": {
            "ModelCheckpoint": {
                "dirpath": pathlib.PurePosixPath("/runs"),
                "best": torch.tensor(0.5),
                "current": np.float64(0.25),
                "history": np.arange(3),
                "interval": datetime.timedelta(seconds=1),
            }
        },
        "hyper_parameters": argparse.Namespace(lr=1e-3, names={"a", "b"}, data=b"\x00\xff"),
        "settings": OmegaConf.create({"a": {"b": [1, "${c}", None]}, "c": 3}),
    }
    for protocol in (2, 4):
        torch.save(checkpoint, path, pickle_protocol=protocol)
        source = open_weights(path)
        np.testing.assert_array_equal(source.read("weight"), weight.numpy())
        root = read_torch_object(map_file(path), "last.ckpt")
        assert root["hyper_parameters"].name == "argparse.Namespace"
        assert root["settings"].name == "omegaconf.dictconfig.DictConfig"
        state = root["callbacks"]["ModelCheckpoint"]
        assert state["dirpath"].name == "pathlib.PurePosixPath"
        assert state["dirpath"].args[0] == "/"


def test_hyper_parameters_are_plain_data_or_refused(tmp_path):
    assert read_hyper_parameters(DATA / "qwen3_lora.ckpt")["cfg"]["lora"]["r"] == 4
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": argparse.Namespace(lr=1e-3)}, path)
    with pytest.raises(ConversionError, match=r"argparse\.Namespace, not plain data"):
        read_hyper_parameters(path)


def test_entries_that_are_no_tensors_are_named(tmp_path):
    torch.save({"weight": torch.ones(1), "version": 3}, tmp_path / "model.bin")
    with pytest.raises(ConversionError, match="version"):
        open_weights(tmp_path / "model.bin")


def test_a_whole_module_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.bin")
    with pytest.raises(ConversionError, match=r"torch\.nn\.modules\.linear\.Linear"):
        open_weights(tmp_path / "model.bin")


def test_nemo_archive_gives_settings_weights_and_files():
    archive = read_nemo(DATA / "asr.nemo")
    assert archive.config["encoder"]["d_model"] == 16
    assert archive.weights.infos["encoder.layers.1.conv.depthwise_conv.weight"].shape == (16, 1, 9)
    assert len(archive.artifact(archive.config["tokenizer"]["model_path"])) == 853
    with pytest.raises(ConversionError, match="no member"):
        archive.artifact("nemo:missing.model")


def test_torch_is_not_imported_by_the_readers():
    code = (
        "import sys; from speechlm2_jax.conversion.readers import open_weights;"
        f"s = open_weights({str(DATA / 'asr.nemo')!r}); s.read('preprocessor.featurizer.fb');"
        "sys.exit('torch' in sys.modules)"
    )
    import subprocess
    import sys

    assert subprocess.run([sys.executable, "-c", code], cwd=DATA.parents[2]).returncode == 0
