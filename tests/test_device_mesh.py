"""The devices of a mesh: of one slice, and of several."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.experimental import mesh_utils

from speechlm2_jax.device_mesh import make_mesh

NAMES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class Device:
    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "a GPU"
    process_index: int = 0


@pytest.fixture
def placed(monkeypatch):
    """make_mesh of devices that are not there: the array of their ids."""
    monkeypatch.setattr("speechlm2_jax.device_mesh.Mesh", lambda array, *_, **__: array)
    as_ids = lambda array: [[[d.id for d in row] for row in part] for part in array]  # noqa: E731
    return lambda sizes, devices: as_ids(make_mesh(sizes, NAMES, devices))


def test_a_mesh_of_one_slice_is_that_of_jax():
    devices = jax.devices()
    mesh = make_mesh((2, 2, 2), NAMES, devices)
    expected = jax.make_mesh((2, 2, 2), NAMES, (jax.sharding.AxisType.Auto,) * 3, devices=devices)
    assert mesh == expected and mesh.axis_types == expected.axis_types


def test_the_first_axis_spans_slices(placed):
    devices = [Device(n, slice_index=n % 2) for n in range(8)]
    ids = placed((4, 2, 1), devices)
    slices = [{n % 2 for row in part for n in row} for part in ids]
    assert slices == [{0}, {0}, {1}, {1}]


def test_gpu_nodes_that_do_not_divide_the_first_axis_are_one_line_of_devices(placed):
    devices = [Device(n, slice_index=n // 4) for n in range(8)]
    assert placed((1, 8, 1), devices) == [[[n] for n in range(8)]]


def test_tpu_slices_must_divide_the_first_axis():
    devices = [Device(n, slice_index=n // 4, platform="tpu") for n in range(8)]
    with pytest.raises(ValueError, match="'data' has size 1, but the devices are in 2 slices"):
        make_mesh((1, 8, 1), NAMES, devices)


def test_physical_axes_may_be_split(monkeypatch):
    given = {}

    def create(sizes, devices, **options):
        given.update(options)
        return np.asarray(devices).reshape(sizes)

    monkeypatch.setattr(mesh_utils, "create_device_mesh", create)
    make_mesh((1, 8, 1), NAMES, jax.devices())
    assert given == {"allow_split_physical_axes": True}
