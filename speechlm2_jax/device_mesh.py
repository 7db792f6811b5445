"""Places the devices of a run on the axes of a mesh, near ones on the same axis."""

from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


def make_mesh(sizes: Sequence[int], names: Sequence[str], devices: Sequence[jax.Device]) -> Mesh:
    """A mesh of all devices.

    An axis takes part of a physical axis of a TPU's torus where no whole one fits: `jax.make_mesh`
    does so on v5e alone, and has no 4 x 16 mesh of v6e:8x8. It also refuses devices of several
    slices (TPU slices, or GPU nodes), whose links are slow: the first axis spans them here. Raises
    ValueError for TPU slices whose number does not divide that axis.
    """
    first, *others = sizes
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and first % slices and devices[0].platform == "tpu":
        raise ValueError(
            f"mesh axis {names[0]!r} has size {first}, but the devices are in {slices} slices, "
            "which must divide it; change trainer.strategy"
        )
    if slices > 1 and first % slices == 0:
        placed = mesh_utils.create_hybrid_device_mesh(
            (first // slices, *others),
            (slices, *(1 for _ in others)),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        placed = mesh_utils.create_device_mesh(
            tuple(sizes), devices, allow_split_physical_axes=True
        )
    return Mesh(placed, tuple(names), axis_types=(AxisType.Auto,) * len(names))
