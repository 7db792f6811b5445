"""The work that is timed on a full-duplex model: a training step, and conversations.

A step is the trainer's own (`training.programs`), on batches of noise in which the agent takes one
turn; a conversation is `offline_inference`, as a user calls it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from speechlm2_jax.batches import (
    DuplexExample,
    DuplexShape,
    HostBatch,
    assemble_duplex_batch,
)
from speechlm2_jax.models import DuplexS2SModel
from speechlm2_jax.strategies import DDPStrategy
from speechlm2_jax.training.run.preparation import Setup
from speechlm2_jax.training.state import first_state, put
from speechlm2_jax.training.trainer_config import TrainerConfig

FRAME_S = 0.08
LEARNING_RATE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Rows of noise, all of one length."""

    batch: int = 4
    seconds: float = 8.0
    user_hz: int = 16000
    agent_hz: int = 22050

    @property
    def frames(self) -> int:
        """Frames of 80 ms in a row."""
        return round(self.seconds / FRAME_S)

    def examples(self, vocab_size: int, *, bos: int, eos: int, pad: int) -> list[DuplexExample]:
        """The agent has the middle half, a token in every other frame.

        `benchmarks/peers/nemo_duplex.py` draws the same numbers in the same order.
        """
        random = np.random.default_rng(0)
        made = []
        for row in range(self.batch):
            user, agent = (
                random.uniform(-0.3, 0.3, round(self.frames * FRAME_S * hz)).astype(np.float32)
                for hz in (self.user_hz, self.agent_hz)
            )
            tokens = np.full(self.frames, pad, np.int32)
            start, end = self.frames // 4, 3 * self.frames // 4
            text = random.integers(3, vocab_size, self.frames).astype(np.int32)
            tokens[start:end:2] = text[start:end:2]
            tokens[start], tokens[end] = bos, eos
            made.append(
                DuplexExample(
                    id=str(row),
                    source_audio=user,
                    target_audio=agent,
                    target_tokens=tokens,
                    source_tokens=np.full_like(tokens, pad),
                )
            )
        return made


class DuplexWork:
    """A model with what is timed on it."""

    def __init__(self, model: DuplexS2SModel, sizes: Conversations):
        self.model, self.sizes = model, sizes
        ids = model.turn_ids
        self.examples = sizes.examples(model.text_vocab_size, bos=ids.bos, eos=ids.eos, pad=ids.pad)

    def count(self, *, trained_only: bool = False) -> int:
        """Parameters, buffers not counted."""
        return sum(
            int(np.prod(self.model.infos[path].shape))
            for path, trained in self.model.trainable.items()
            if np.any(trained) or not trained_only
        )

    def training(self, remat: str) -> Callable[[], float]:
        """A call that takes one step and waits for it; it gives the loss."""
        model, batch = self.model, self.batch()
        precision = "32-true" if model.compute_dtype == np.float32 else "bf16-true"
        config = TrainerConfig(
            gradient_clip_val=1.0, precision=precision, remat=remat, devices=1, max_steps=1
        )
        setup = Setup.of(model, config, DDPStrategy(), devices=jax.devices()[:1])
        programs = setup.programs(model)
        state = first_state(model.variables, setup.layout, setup.optimizer)
        frozen = put(model.variables, setup.layout.frozen, copy=False)

        def step() -> float:
            nonlocal state
            state, report = programs.train(state, frozen, batch, LEARNING_RATE)
            jax.block_until_ready(state)
            return float(report.loss)

        return step

    def batch(self) -> HostBatch:
        """The conversations as one batch without padding."""
        first = self.examples[0]
        shape = DuplexShape(
            sequences=self.sizes.batch,
            tokens=len(first.target_tokens),
            source_samples=len(first.source_audio),
            target_samples=len(first.target_audio),
        )
        arrays = assemble_duplex_batch([self.examples], shape, pad_id=self.model.text_pad_id)
        return HostBatch(arrays=arrays, ids=(), bucket="")

    def training_flops(self) -> float:
        """FLOPs that the maths of a step needs, the codec's not counted."""
        return self.model.flops(self.batch())

    def conversations(self, rows: int, *, decode_audio: bool) -> Callable[[], dict[str, Any]]:
        """A call that runs offline inference on `rows` of the conversations."""
        audio = np.stack([example.source_audio for example in self.examples[:rows]])
        lengths = np.full(rows, audio.shape[1], np.int32)
        return lambda: self.model.offline_inference(audio, lengths, decode_audio)
