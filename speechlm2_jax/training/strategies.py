"""How devices are used: Lightning's strategy names, mapped to sizes of the mesh.

DDP copies the parameters to every device. FSDP shards them, and their optimizer state, over all.
ModelParallelStrategy is FSDP2 with tensor parallelism, as NeMo builds it: its data-parallel
devices also share the parameters, unless `fsdp_size` says how many of them do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax

from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding, make_sharding
from speechlm2_jax.training.registry import select

Size = int | Literal["auto"]
_TORCH_ONLY: Mapping[str, str] = {
    key: "about torch's process groups and hooks; one compiled program communicates here"
    for key in (
        "accelerator",
        "cluster_environment",
        "ddp_comm_hook",
        "ddp_comm_state",
        "ddp_comm_wrapper",
        "device_mesh",
        "find_unused_parameters",
        "gradient_as_bucket_view",
        "model_averaging_period",
        "parallel_devices",
        "precision_plugin",
        "process_group_backend",
        "start_method",
        "static_graph",
        "timeout",
        "bucket_cap_mb",
        "broadcast_buffers",
        "checkpoint_io",
        "auto_wrap_policy",
        "use_orig_params",
        "mixed_precision",
        "state_dict_type",
        "save_distributed_checkpoint",
        "activation_checkpointing",
        "activation_checkpointing_policy",
    )
}


@dataclass(frozen=True, kw_only=True)
class DDPStrategy:
    """Data parallelism: every device holds all parameters."""

    IGNORED: ClassVar[Mapping[str, str]] = _TORCH_ONLY

    def mesh_sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the mesh axes over so many devices."""
        return {"data": devices}


@dataclass(frozen=True, kw_only=True)
class FSDPStrategy:
    """Fully sharded data parallelism over all devices (ZeRO 3)."""

    sharding_strategy: Literal["FULL_SHARD"] = "FULL_SHARD"

    IGNORED: ClassVar[Mapping[str, str]] = _TORCH_ONLY
    REFUSED: ClassVar[Mapping[str, Any]] = {
        "cpu_offload": "parameters stay on the devices; use more devices",
    }

    def mesh_sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the mesh axes over so many devices."""
        return {"fsdp": devices}


@dataclass(frozen=True, kw_only=True)
class ModelParallelStrategy:
    """Fully sharded data parallelism times tensor parallelism."""

    data_parallel_size: Size = "auto"
    """Groups of a global batch that are computed at once; auto: what the others leave."""
    tensor_parallel_size: Size = "auto"
    """Devices that share each layer; auto: what data_parallel_size leaves, else 1."""
    fsdp_size: Size = "auto"
    """Of the data-parallel devices, how many share one copy of the parameters; auto: all."""

    ALIASES: ClassVar[Mapping[str, str]] = {
        "data_parallel": "data_parallel_size",
        "tensor_parallel": "tensor_parallel_size",
    }
    IGNORED: ClassVar[Mapping[str, str]] = _TORCH_ONLY

    def mesh_sizes(self, devices: int) -> dict[str, int]:
        """Sizes of the mesh axes over so many devices. Raises SettingsError if they do not fit."""
        data, tensor = self.data_parallel_size, self.tensor_parallel_size
        if tensor == "auto":
            tensor = 1 if data == "auto" else max(1, devices // data)
        if data == "auto":
            data = max(1, devices // tensor)
        fsdp = data if self.fsdp_size == "auto" else self.fsdp_size
        if min(data, tensor, fsdp) < 1 or data % fsdp:
            raise SettingsError(
                f"trainer.strategy: fsdp_size={fsdp} must divide data_parallel_size={data}, "
                "and every size must be at least 1"
            )
        return {"data": data // fsdp, "fsdp": fsdp, "tensor": tensor}


Strategy = DDPStrategy | FSDPStrategy | ModelParallelStrategy
STRATEGIES: Mapping[str, type[Any]] = {
    "DDPStrategy": DDPStrategy,
    "FSDPStrategy": FSDPStrategy,
    "ModelParallelStrategy": ModelParallelStrategy,
}
_BY_NAME: Mapping[str, Strategy] = {
    "auto": DDPStrategy(),
    "ddp": DDPStrategy(),
    "ddp_find_unused_parameters_true": DDPStrategy(),
    "fsdp": FSDPStrategy(),
}


def read_strategy(value: Any) -> Strategy:
    """Reads `trainer.strategy`: a name, a block with `_target_`, or one of the classes here.

    Raises SettingsError for what is not known.
    """
    if isinstance(value, Strategy):
        return value
    if isinstance(value, Mapping):
        return select(STRATEGIES, value, "trainer.strategy")
    if isinstance(value, str) and value in _BY_NAME:
        return _BY_NAME[value]
    choices = ", ".join([*sorted(_BY_NAME), *sorted(STRATEGIES)])
    raise SettingsError(f"trainer.strategy: unsupported {value!r}; choose one of {choices}")


def build_mesh(strategy: Strategy, devices: Sequence[jax.Device]) -> Sharding:
    """Arranges devices as the strategy says. Raises SettingsError if the sizes do not fit them."""
    try:
        return make_sharding(**strategy.mesh_sizes(len(devices)), devices=devices)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"trainer.strategy: {error}") from error


def check_groups(groups: int, sharding: Sharding) -> None:
    """Raises SettingsError unless the mesh can compute global batches of so many groups."""
    size = sharding.data_parallel_size
    if groups % size:
        fitting = [n for n in range(1, groups + 1) if groups % n == 0]
        raise SettingsError(
            f"this run's global batches have {groups} groups, which {size} data-parallel devices "
            f"cannot share; resume with a data-parallel size of {', '.join(map(str, fitting))}"
        )
