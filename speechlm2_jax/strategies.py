"""How devices are used: Lightning's and NeMo's strategy names, mapped to sizes of the mesh.

- DDP copies the parameters to every device.
- FSDP shards the parameters and their optimizer state over all devices.
- ModelParallelStrategy combines FSDP with tensor parallelism, as NeMo does with FSDP2. The
  parameters are sharded over all data-parallel devices, or over `fsdp_size` of them (HSDP).
  Sequence and context parallelism can be added.
- NeMo's AutomodelParallelStrategy has other key names for the same sizes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax

from speechlm2_jax.settings import Refusal, SettingsError
from speechlm2_jax.settings.targets import select
from speechlm2_jax.sharding import Sharding, make_sharding

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

    def mesh_sizes(self, devices: int) -> dict[str, Any]:
        """Sizes of the mesh axes for `devices` devices."""
        return {"data": devices}


@dataclass(frozen=True, kw_only=True)
class FSDPStrategy:
    """Fully sharded data parallelism over all devices (ZeRO 3)."""

    sharding_strategy: Literal["FULL_SHARD", "HYBRID_SHARD", "NO_SHARD"] = "FULL_SHARD"
    device_mesh: tuple[int, int] | None = None
    """HYBRID_SHARD: (copies of the parameters, devices that share one copy)."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        key: reason for key, reason in _TORCH_ONLY.items() if key != "device_mesh"
    }
    REFUSED: ClassVar[Mapping[str, Refusal]] = {
        "cpu_offload": "parameters stay on the devices; use more devices",
    }

    def mesh_sizes(self, devices: int) -> dict[str, Any]:
        """Sizes of the mesh axes for `devices` devices.

        HYBRID_SHARD without `device_mesh` shards the parameters over the devices of each process,
        and every process has a copy.
        """
        if self.sharding_strategy == "NO_SHARD":
            return {"data": devices}
        if self.sharding_strategy == "FULL_SHARD":
            return {"fsdp": devices}
        processes = jax.process_count()
        copies, shards = self.device_mesh or (processes, devices // processes)
        return {"data": copies, "fsdp": shards}


@dataclass(frozen=True, kw_only=True)
class ModelParallelStrategy:
    """Fully sharded data parallelism times tensor, sequence and context parallelism."""

    data_parallel_size: Size = "auto"
    """Groups of a global batch that are computed at once; auto: devices / the other sizes."""
    tensor_parallel_size: Size = "auto"
    """Devices over which each layer is sharded; auto: devices / data_parallel_size."""
    fsdp_size: Size = "auto"
    """Data-parallel devices over which one copy of the parameters is sharded; auto: all."""
    context_parallel_size: int = 1
    """Devices over which each sequence is sharded; they compute ring attention."""
    sequence_parallel: bool = False
    """Between blocks, shard each sequence over the tensor-parallel devices (as Megatron does)."""

    ALIASES: ClassVar[Mapping[str, str]] = {
        "data_parallel": "data_parallel_size",
        "tensor_parallel": "tensor_parallel_size",
        "context_parallel": "context_parallel_size",
    }
    IGNORED: ClassVar[Mapping[str, str]] = _TORCH_ONLY

    def mesh_sizes(self, devices: int) -> dict[str, Any]:
        """What `make_sharding` takes, over so many devices.

        Raises SettingsError if they do not fit.
        """
        data, tensor, context = (
            self.data_parallel_size,
            self.tensor_parallel_size,
            self.context_parallel_size,
        )
        left = devices // max(context, 1)
        if tensor == "auto":
            tensor = 1 if data == "auto" else max(1, left // data)
        if data == "auto":
            data = max(1, left // tensor)
        fsdp = data if self.fsdp_size == "auto" else self.fsdp_size
        if min(data, tensor, fsdp, context) < 1 or data % fsdp:
            raise SettingsError(
                f"trainer.strategy: fsdp_size={fsdp} must divide data_parallel_size={data}, "
                "and every size must be at least 1"
            )
        if data * tensor * context != devices:
            raise SettingsError(_mismatch(data, tensor, context, devices))
        if self.sequence_parallel and tensor == 1:
            raise SettingsError(
                "trainer.strategy.sequence_parallel: has no effect with tensor_parallel_size=1; "
                "give it at least 2, or leave sequence_parallel out"
            )
        return {
            "data": data // fsdp,
            "fsdp": fsdp,
            "tensor": tensor,
            "context": context,
            "sequence_parallel": self.sequence_parallel,
        }


def _mismatch(data: int, tensor: int, context: int, devices: int) -> str:
    left = max(devices // context, 1)
    fitting = [f"{left // n} x {n}" for n in range(1, left + 1) if left % n == 0]
    hint = (
        f"with context_parallel_size={context}, data_parallel_size x tensor_parallel_size may be "
        + ", ".join(fitting)
        if devices % context == 0
        else f"context_parallel_size must divide {devices}"
    )
    return (
        f"trainer.strategy: data_parallel_size={data} x tensor_parallel_size={tensor} x "
        f"context_parallel_size={context} is {data * tensor * context}, but {devices} devices are "
        f"in use; {hint}"
    )


@dataclass(frozen=True, kw_only=True)
class AutomodelParallelStrategy:
    """ModelParallelStrategy with the key names of NeMo's strategy over nemo_automodel."""

    dp_size: int | None = None
    """Groups of a global batch that are computed at once; None: devices / the other sizes."""
    dp_replicate_size: int | None = None
    """Copies of the parameters among the data-parallel devices; None: one."""
    tp_size: int = 1
    """Devices over which each layer is sharded."""
    cp_size: int = 1
    """Devices over which each sequence is sharded."""
    pp_size: Literal[1] = 1
    """Pipeline parallelism is not supported: use FSDP or more tensor-parallel devices."""
    ep_size: Literal[1] = 1
    """Expert parallelism is not supported: no supported LLM has experts."""
    sequence_parallel: bool = False
    """Between blocks, the sequence is sharded over the tensor-parallel devices."""
    activation_checkpointing_llm: bool | None = None
    """True, False: `trainer.remat.llm` is full, none."""
    activation_checkpointing_perception: bool | None = None
    """True, False: `trainer.remat.perception` is full, none."""

    IGNORED: ClassVar[Mapping[str, str]] = {
        **_TORCH_ONLY,
        "distributed_config": "about FSDP2's own options; the mesh defines what is sharded",
        "moe_config": "no supported LLM has experts",
    }

    def mesh_sizes(self, devices: int) -> dict[str, Any]:
        """Arguments of `make_sharding`. Raises SettingsError if they do not fit the devices."""
        data = self.dp_size or max(1, devices // (self.tp_size * self.cp_size))
        copies = self.dp_replicate_size or 1
        if data % copies:
            raise SettingsError(
                f"trainer.strategy: dp_replicate_size={copies} must divide dp_size={data}"
            )
        return ModelParallelStrategy(
            data_parallel_size=data,
            tensor_parallel_size=self.tp_size,
            context_parallel_size=self.cp_size,
            fsdp_size=data // copies,
            sequence_parallel=self.sequence_parallel,
        ).mesh_sizes(devices)


_COMPONENTS: tuple[str, ...] = ("llm", "perception")
Strategy = DDPStrategy | FSDPStrategy | ModelParallelStrategy | AutomodelParallelStrategy
STRATEGIES: Mapping[str, type[Any]] = {
    "DDPStrategy": DDPStrategy,
    "FSDPStrategy": FSDPStrategy,
    "ModelParallelStrategy": ModelParallelStrategy,
    "AutomodelParallelStrategy": AutomodelParallelStrategy,
}
_BY_NAME: Mapping[str, Strategy] = {
    "auto": DDPStrategy(),
    "ddp": DDPStrategy(),
    "ddp_find_unused_parameters_true": DDPStrategy(),
    "fsdp": FSDPStrategy(),
}


def read_strategy(value: object) -> Strategy:
    """Reads `trainer.strategy`: a name, a block with `_target_`, or one of the classes here.

    Raises SettingsError for an unknown strategy.
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
    """Makes the mesh of a strategy. Raises SettingsError if its sizes do not fit the devices."""
    try:
        return make_sharding(**strategy.mesh_sizes(len(devices)), devices=devices)
    except SettingsError:
        raise
    except ValueError as error:
        raise SettingsError(f"trainer.strategy: {error}") from error


def remat_policies(chosen: str | Mapping[str, str], strategy: Strategy) -> Mapping[str, str]:
    """The rematerialisation policy of each component.

    It is that of `trainer.remat`, unless the strategy sets `activation_checkpointing_*`.
    """
    by_component = (
        dict(chosen) if isinstance(chosen, Mapping) else dict.fromkeys(_COMPONENTS, chosen)
    )
    if isinstance(strategy, AutomodelParallelStrategy):
        given = {
            "llm": strategy.activation_checkpointing_llm,
            "perception": strategy.activation_checkpointing_perception,
        }
        by_component |= {p: "full" if on else "none" for p, on in given.items() if on is not None}
    return by_component


def check_heads(heads: Mapping[str, int], sharding: Sharding) -> None:
    """Raises SettingsError unless the tensor axis divides each kind of heads."""
    size = sharding.tensor_size
    if any(count % size for count in heads.values()):
        least = math.gcd(*heads.values())
        fitting = ", ".join(str(n) for n in range(1, least + 1) if least % n == 0)
        kinds = ", ".join(f"{count} {kind}" for kind, count in heads.items())
        raise SettingsError(
            f"trainer.strategy: tensor_parallel_size={size} does not divide the model's heads "
            f"({kinds}); sizes that fit: {fitting}"
        )


def check_groups(groups: int, sharding: Sharding) -> None:
    """Raises SettingsError if the data-parallel size does not divide the groups of a batch."""
    size = sharding.data_parallel_size
    if groups % size:
        fitting = [n for n in range(1, groups + 1) if groups % n == 0]
        raise SettingsError(
            f"this run's global batches have {groups} groups, which a data-parallel size of {size} "
            f"does not divide; resume with a data-parallel size of {', '.join(map(str, fitting))}"
        )
