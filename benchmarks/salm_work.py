"""The work that is timed: a training step and a generation of a SALM, on random mel features.

Everything that runs is the project's own: `networks.salm` behind the mel features, the trainer's
`Programs`, and `generation.salm.decode`. The arithmetic is timed, not the data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.presets import Preset
from speechlm2_jax.batches import HostBatch, SalmBatch, StepLosses
from speechlm2_jax.generation import salm as generation
from speechlm2_jax.generation.salm import DecodingConfig, Prompts
from speechlm2_jax.layers.initialize import draw
from speechlm2_jax.layers.module import Variables, abstract, describe, merge, split
from speechlm2_jax.networks import salm
from speechlm2_jax.networks.flops import EncodedAudio, salm_flops
from speechlm2_jax.networks.salm import Salm, SalmConfig, SalmModes
from speechlm2_jax.perception.frames import Frames
from speechlm2_jax.perception.perception import PerceptionModes
from speechlm2_jax.pytrees import register_pytree
from speechlm2_jax.sharding import make_sharding
from speechlm2_jax.training.optimizer import AdamWConfig, Optimizer
from speechlm2_jax.training.programs import Programs
from speechlm2_jax.training.state import Partition, first_state, plan_layout, put
from speechlm2_jax.training.step import StepFunctions

FRAMES_PER_S = 100
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One batch: rows of `prompt` tokens, the audio, and `response` tokens."""

    batch: int = 4
    seconds: float = 8.0
    prompt: int = 16
    response: int = 32

    @property
    def mel_frames(self) -> int:
        """Mel frames of a clip."""
        return int(self.seconds * FRAMES_PER_S)


@register_pytree
@dataclass(frozen=True, kw_only=True)
class MelBatch:
    """A batch whose clips are mel features already."""

    rows: SalmBatch
    """Its audio is empty."""
    mel: Any
    """Float32 [G, C, T, M]."""


def encode(
    network: Salm, batch: MelBatch, modes: SalmModes
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Encodes the clips, all of full length, as `networks.salm.encode_audio` does."""
    groups, clips, steps, bins = batch.mel.shape
    perception = network.perception
    output = perception.encode(
        Frames(
            frames=batch.mel.reshape(groups * clips, steps, bins),
            lengths=jnp.full(groups * clips, steps, jnp.int32),
        ),
        perception.config.encoder.frame_count(steps),
        modes=modes.perception,
        dtype=network.dtype,
        remat=network.config.remat.perception,
    )
    frames = output.frames.reshape(groups, clips, *output.frames.shape[1:])
    return frames, output.statistics


def losses(
    graphdef: Any, variables: Variables, batch: MelBatch, *, key: jax.Array, train: bool
) -> StepLosses:
    """`networks.salm.losses` behind the mel features, encoder and LLM in training mode."""
    del key
    network: Salm = merge(graphdef, variables)
    modes = SalmModes(perception=PerceptionModes(encoder=train), llm=False)
    inputs = salm.join(network, batch.rows, *encode(network, batch, modes))
    return salm.score(network, inputs, batch.rows, modes)


@partial(jax.jit, static_argnames=("graphdef", "config"))
def prefill(graphdef: Any, variables: Variables, batch: MelBatch, config: DecodingConfig) -> Any:
    """Encodes the audio, runs the prompts and chooses the first token: a state of the loop."""
    network: Salm = merge(graphdef, variables)
    modes = SalmModes()
    inputs = salm.join(network, batch.rows, *encode(network, batch, modes))
    rows = batch.rows.attention_mask.reshape(inputs.embeds.shape[:2])
    lengths = jnp.sum(rows, axis=1, dtype=jnp.int32)
    return generation.prefill(network.llm, Prompts(inputs.embeds, lengths, rows), config)


@partial(jax.jit, static_argnames=("graphdef", "config"), donate_argnames=("state",))
def decode(
    graphdef: Any, variables: Variables, state: Any, config: DecodingConfig
) -> tuple[jax.Array, Any]:
    """Decodes the other tokens: ids [B, A], and the state, in the memory of the one given."""
    network: Salm = merge(graphdef, variables)
    state = generation.decode(network.llm, state, config, config.max_new_tokens)
    return generation.read_outputs(state, config).ids, state


class Work:
    """A model of a preset with random weights, and what is timed on it."""

    def __init__(
        self,
        preset: Preset,
        sizes: Sizes,
        config: SalmConfig,
        *,
        seed: int = 0,
        inference_only: bool = False,
    ):
        """With `inference_only` nothing is trained: weights have the dtype of the computation."""
        self.sizes, self.config, self.preset = sizes, config, preset
        module = abstract(lambda rngs: Salm(config, rngs=rngs))
        self.graphdef, self.infos = split(module)[0], describe(module)
        self.sharding = make_sharding(devices=jax.devices()[:1])
        self.trains = {
            path: not inference_only and (not path.startswith("llm.") or ".lora_" in path)
            for path, info in self.infos.items()
            if not info.is_buffer
        }
        self.partition = Partition.of(self.infos, self.trains)
        self.optimizer = Optimizer(
            transform=AdamWConfig(lr=LEARNING_RATE).transform(), clip_norm=1.0
        )
        self.layout = plan_layout(
            self.infos, self.partition, self.optimizer, self.sharding, config.compute_dtype
        )
        self._seed, self._random = seed, np.random.default_rng(seed)

    @cached_property
    def variables(self) -> Variables:
        """The weights, drawn on the device when first asked for."""
        make = lambda: split(Salm(self.config, rngs=nnx.Rngs(self._seed)))[1]  # noqa: E731
        return draw(make, self.layout.variables)

    @property
    def weight_bytes(self) -> int:
        """What the weights take on the device; nothing is drawn to tell."""
        return _bytes(self.layout.variables)

    @property
    def training_bytes(self) -> int:
        """What weights, gradients and optimizer state take on the device while training."""
        gradients = 4 * self.count(trained_only=True)
        return _bytes(self.layout.state) + _bytes(self.layout.frozen) + gradients

    def count(self, *, trained_only: bool = False) -> int:
        """Parameters, buffers not counted."""
        return sum(
            int(np.prod(self.infos[path].shape))
            for path, trained in self.trains.items()
            if trained or not trained_only
        )

    @cached_property
    def programs(self) -> Programs:
        """The trainer's compiled side."""
        functions = StepFunctions(
            losses=partial(losses, self.graphdef),
            optimizer=self.optimizer,
            sharding=self.sharding,
            seed=0,
        )
        return Programs(functions, self.layout)

    def training(self) -> Callable[[], float]:
        """A call that takes one step and waits for it; it gives the loss."""
        state = first_state(self.variables, self.layout, self.optimizer)
        frozen = put(self.variables, self.layout.frozen, copy=False)
        batch = self.training_batch

        def step() -> float:
            nonlocal state
            state, report = self.programs.train(state, frozen, batch, LEARNING_RATE)
            jax.block_until_ready(state)
            return float(report.loss)

        return step

    def generation(self) -> Callable[[], np.ndarray]:
        """A call that generates exactly `sizes.response` tokens per prompt, greedily."""
        prefilling, decoding = self._prefilling()
        return lambda: np.asarray(decoding(prefilling())[0])

    def prefilling(self) -> Callable[[], Any]:
        """A call that encodes, runs the prompts, chooses each row's first token, and waits."""
        prefilling, _ = self._prefilling()
        return lambda: jax.block_until_ready(prefilling())

    def _prefilling(self) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        config = DecodingConfig(max_new_tokens=self.sizes.response, stop_ids=(), pad_id=0)
        batch = self.programs.put(replace(self.training_batch, arrays=self._batch(0)))
        given = (self.graphdef, self.variables)
        return lambda: prefill(*given, batch, config), lambda state: decode(*given, state, config)

    @cached_property
    def training_batch(self) -> HostBatch:
        """Sequences of prompt, audio and response, each response token a target."""
        return HostBatch(arrays=self._batch(self.sizes.response), ids=(), bucket="")

    def training_flops(self) -> float:
        """FLOPs that the maths of a step needs (`networks.flops`)."""
        return self._flops(self.trains)

    def forward_flops(self) -> float:
        """FLOPs of one pass over prompts and responses."""
        return self._flops(dict.fromkeys(self.trains, False))

    def _flops(self, trains: dict[str, bool]) -> float:
        encoder = self.config.perception.encoder
        frames = np.full(self.sizes.batch, encoder.frame_count(self.sizes.mel_frames))
        return salm_flops(
            self.infos,
            trains,
            self._batch(self.sizes.response).rows,
            EncodedAudio(
                encoded=frames, adapted=frames, subsampling_factor=encoder.subsampling_factor
            ),
        )

    def _batch(self, response: int) -> MelBatch:
        """Sequences of prompt, audio and `response` tokens, all of one length."""
        sizes, llm = self.sizes, self.config.llm
        frames = self.config.perception.encoder.frame_count(sizes.mel_frames)
        tokens = sizes.prompt + frames + response
        shape = (1, sizes.batch, tokens)
        start, first_response = sizes.prompt, sizes.prompt + frames
        ids = self._random.integers(10, llm.vocab_size, shape).astype(np.int32)
        place = np.full(shape, -1, np.int32)
        clip = np.arange(sizes.batch, dtype=np.int32)[None, :, None] * frames
        place[..., start:first_response] = clip + np.arange(frames, dtype=np.int32)
        is_scored = np.zeros(shape, bool)
        is_scored[..., first_response - 1 : tokens - 1] = response > 0
        numbers = np.arange(sizes.batch, dtype=np.int32)[None]
        rows = SalmBatch(
            audio=np.zeros((1, sizes.batch, 0), np.float32),
            audio_lengths=np.zeros((1, sizes.batch), np.int32),
            audio_extent=np.zeros(1, np.int32),
            clip_ids=numbers,
            tokens=np.where(place < 0, ids, 0),
            audio_index=place,
            attention_mask=np.ones(shape, bool),
            segments=np.ones(shape, np.int32),
            positions=np.broadcast_to(np.arange(tokens, dtype=np.int32), shape).copy(),
            targets=np.where(is_scored, np.roll(ids, -1, axis=-1), 0),
            loss_mask=is_scored,
            sequence_ids=numbers,
        )
        mel_shape = (1, sizes.batch, sizes.mel_frames, self.preset.mel_bins)
        return MelBatch(rows=rows, mel=self._random.normal(size=mel_shape).astype(np.float32))


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
