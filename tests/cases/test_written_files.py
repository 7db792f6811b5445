"""Written files can be read by whom the umask lets, whatever wrote them."""

import os
from pathlib import Path

import numpy as np
import pytest

from speechlm2_jax.conversion.readers import write_safetensors
from speechlm2_jax.conversion.writers import write_nemo, write_torch_file

TENSORS = {"a": np.zeros((2, 3), np.float32)}


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_safetensors(folder / "model.safetensors", TENSORS),
        lambda folder: write_torch_file(folder / "model.ckpt", TENSORS),
        lambda folder: write_nemo(folder / "model.nemo", {"target": "a.B"}, TENSORS, {}),
    ],
    ids=["safetensors", "torch", "nemo"],
)
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, umask, write, is_there):
    folder = tmp_path / "new"
    write(folder)
    if is_there:
        write(folder)
    files = list(folder.iterdir())
    assert len(files) == 1
    assert files[0].stat().st_mode & 0o777 == 0o666 & ~umask
    assert folder.stat().st_mode & 0o777 == 0o777 & ~umask
