"""Compiles a run's training step or its generation for a topology and estimates the cost."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import jax

from speechlm2_jax.aot.chips import Topology
from speechlm2_jax.aot.collectives import collectives
from speechlm2_jax.aot.report import Report
from speechlm2_jax.batches import BatchShape, HostBatch, full_batch
from speechlm2_jax.console import phase
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.sharding import Sharding, for_inference
from speechlm2_jax.training.protocol import ModelOutline
from speechlm2_jax.training.run.preparation import Setup
from speechlm2_jax.training.run.summary import device_bytes


class CompilableModel(ModelOutline, Protocol):
    """A model whose training step and generation can be compiled ahead of time."""

    @property
    def audio_locator_tag_id(self) -> int:
        """Token id of the placeholder of a recording."""
        ...

    def generation_layout(self, placement: Sharding) -> Mapping[str, jax.ShapeDtypeStruct]:
        """Dtype and sharding of every variable for inference."""
        ...

    def compile_generation(
        self, placement: Sharding, shape: BatchShape, max_new_tokens: int
    ) -> jax.stages.Compiled:
        """Compiles generation for prompts of one shape."""
        ...

    def generation_flops(self, batch: HostBatch) -> float:
        """Model FLOPs of one forward pass."""
        ...


def training_report(
    model: CompilableModel, setup: Setup, topology: Topology, shape: BatchShape
) -> Report:
    """Compiles the training step with a batch of `shape` on each data-parallel device.

    Raises SettingsError if the compiler finds that it does not fit.
    """
    groups = setup.sharding.data_parallel_size
    batch = _full(model, shape, groups)
    begin = time.monotonic()
    compiled = _fitting(lambda: setup.programs(model).compile_ahead(batch), topology)
    state, frozen = setup.layout.state, setup.layout.frozen
    known = {
        "trained parameters": device_bytes(state.trainable),
        "frozen parameters and buffers": device_bytes((frozen, state.buffers)),
        "optimizer state": device_bytes(state.opt_state),
    }
    return Report(
        program="a training step",
        topology=topology.name,
        mesh=_describe(setup.sharding),
        shape=_describe_shape(shape, groups),
        memory=_memory(known, "gradients, activations and other scratch", compiled),
        chip=topology.chip,
        flops_per_s=topology.flops_per_s,
        flops=model.flops(_full(model, shape, 1)) * groups / len(topology.devices),
        read_bytes=0.0,
        collectives=tuple(collectives(compiled.as_text())),
        compiled_in_s=time.monotonic() - begin,
    )


def generation_report(
    model: CompilableModel,
    setup: Setup,
    topology: Topology,
    shape: BatchShape,
    new_tokens: int,
) -> Report:
    """Compiles generation for `shape.sequences` prompts on each data-parallel device.

    Raises SettingsError if the compiler finds that it does not fit.
    """
    placement = for_inference(setup.sharding.mesh)
    groups = placement.data_parallel_size
    begin = time.monotonic()
    with phase("compiling the generation program"):
        compiled = _fitting(
            lambda: model.compile_generation(placement, shape, new_tokens), topology
        )
    weights = model.generation_layout(placement)
    longer = replace(shape, tokens=shape.tokens + new_tokens)
    llm = {path: leaf for path, leaf in weights.items() if path.startswith("llm.")}
    return Report(
        program=f"generation of {new_tokens} tokens",
        topology=topology.name,
        mesh=_describe(placement),
        shape=_describe_shape(shape, groups),
        memory=_memory({"parameters": device_bytes(weights)}, "cache and other scratch", compiled),
        chip=topology.chip,
        flops_per_s=topology.flops_per_s,
        flops=model.generation_flops(_full(model, longer, 1)) * groups / len(topology.devices),
        read_bytes=float(device_bytes(llm) * new_tokens),
        collectives=tuple(collectives(compiled.as_text())),
        compiled_in_s=time.monotonic() - begin,
    )


def _memory(known: Mapping[str, int], scratch: str, compiled: Any) -> dict[str, int]:
    """Memory by category, as the compiler counts it: arrays are padded to tiles."""
    stats = compiled.memory_analysis()
    rest = stats.argument_size_in_bytes - sum(known.values())
    return {
        **known,
        "batch, and padding of arrays": max(rest, 0),
        "results not stored in place of an argument": (
            stats.output_size_in_bytes - stats.alias_size_in_bytes
        ),
        scratch: stats.temp_size_in_bytes,
        "program": stats.generated_code_size_in_bytes,
    }


def is_too_large(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the compiler failed as the program does not fit into the device's memory."""
    text = str(error)
    return "RESOURCE_EXHAUSTED" in text or "hbm" in text.lower()


def _fitting(compile_it: Callable[[], jax.stages.Compiled], topology: Topology) -> Any:
    try:
        return compile_it()
    except jax.errors.JaxRuntimeError as error:
        if not is_too_large(error):
            raise
        text = " ".join(str(error).split())
        raise SettingsError(f"{topology.name}: DOES NOT FIT: {text[:400]}") from error


def _full(model: CompilableModel, shape: BatchShape, groups: int) -> HostBatch:
    arrays = full_batch(
        shape,
        groups,
        frame_count=model.frame_count,
        placeholder_id=model.audio_locator_tag_id,
    )
    return HostBatch(arrays=arrays, ids=(), bucket="")


def _describe(sharding: Sharding) -> str:
    sizes = {axis: n for axis, n in sharding.mesh.shape.items() if n > 1}
    return " x ".join(f"{axis} {n}" for axis, n in sizes.items()) or "one device"


def _describe_shape(shape: BatchShape, groups: int) -> str:
    return (
        f"{groups} groups of {shape.sequences} sequences of {shape.tokens} tokens, "
        f"{shape.clips} clips of {shape.samples} samples"
    )
