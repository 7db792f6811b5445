"""First steps of a speech encoder: which phoneme sounds when, as the synthesizer itself tells.

CTC alone needs thousands of steps of small batches before it transcribes anything. The phonemes of
every 20 ms are four times as many targets as there are frames, each right next to its sound; the
CTC loss beside them learns to spell on the way.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from flax import nnx
from tqdm import tqdm

from speechlm2_jax.asr.ctc import CtcConfig, CtcNetwork, ctc_loss
from speechlm2_jax.layers.linear import Linear
from speechlm2_jax.layers.module import Variables, merge, split
from speechlm2_jax.models.ctc import CTCModel
from speechlm2_jax.perception.fastconformer import EncoderOutput
from speechlm2_jax.perception.perception import PerceptionModes

RATE_HZ = 16_000
PARTS = 4
"""Phonemes are told apart in so many parts of a frame of 80 ms."""
PHONETIC_LAYERS = 4
"""So many layers of the encoder have the phonemes; the layers above are left to spelling."""
EDGES_S = (1.55, 1.9, 2.2, 2.6, 3.2, 4.2, 7.0)
"""Utterances are padded to the next of these."""
ROWS, AHEAD = 16, 4
WARMUP_STEPS = 150
SAVE_EVERY = 500
TRAINING = PerceptionModes(log_mel=True, spec_augment=True, encoder=True)


@dataclass(frozen=True, kw_only=True)
class Round:
    """So many steps over one manifest, the rate falling as a cosine from the first to the last."""

    manifest: Path
    steps: int
    rates: tuple[float, float]
    phonetic_weight: float
    ctc_weight: float


class PhoneticNetwork(CtcNetwork):
    """A CTC network with a second head, for phonemes."""

    def __init__(self, config: CtcConfig, phonemes: int, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width = config.encoder.width
        self.phonemes = Linear(width, PARTS * phonemes, axes=(None, "embed"), rngs=rngs)

    def phonetic_logits(
        self, audio: jax.Array, lengths: jax.Array, keys: jax.Array
    ) -> tuple[jax.Array, jax.Array, EncoderOutput]:
        """Scores of phonemes [B, T, PARTS, phonemes] and pieces [B, T, C] in audio [B, S].

        Also what the encoder made of it.
        """
        features = self._features(audio, lengths, TRAINING, keys)
        encoded = self.encoder(
            features.frames, features.lengths, train=True, keys=keys, return_layers=True
        )
        assert encoded.layers is not None
        count = self.config.frame_capacity(audio.shape[1])
        phonetic = self.phonemes(encoded.layers[PHONETIC_LAYERS - 1][:, :count])
        phonetic = phonetic.reshape(*phonetic.shape[:2], PARTS, -1)
        return phonetic, self.logits(encoded.frames[:, :count]), encoded


@dataclass(frozen=True)
class Speech:
    """A manifest in memory. `starts_s` and `phonemes` are lists over utterances."""

    waves: list[np.ndarray]
    labels: list[list[int]]
    starts_s: list[np.ndarray]
    phonemes: list[np.ndarray]
    names: Sequence[str]

    @staticmethod
    def read(manifest: Path, model: CTCModel, names: Sequence[str] = ()) -> "Speech":
        """Reads audio, labels and phonemes; the last phoneme class is silence at either end.

        The other classes are `names`, by default those that occur. Raises KeyError for another.
        """
        rows = [json.loads(line) for line in manifest.read_text().splitlines()]
        with ThreadPoolExecutor(2) as pool:
            paths = [manifest.parent / row["audio_filepath"] for row in rows]
            waves = list(pool.map(lambda p: soundfile.read(p, dtype="int16")[0], paths))
        names = names or sorted({name for row in rows for _, name in row["phonemes"]})
        number = {name: i for i, name in enumerate(names)}
        return Speech(
            waves=waves,
            labels=model.tokenizer.texts_to_ids([row["text"] for row in rows]),
            starts_s=[np.array([start for start, _ in row["phonemes"]]) for row in rows],
            phonemes=[np.array([number[n] for _, n in row["phonemes"]]) for row in rows],
            names=names,
        )

    def batches(self, seed: int) -> Iterator[np.ndarray]:
        """Indices of the rows of each batch, all of one length's edge, without end."""
        rng = np.random.default_rng(seed)
        seconds = np.array([len(wave) for wave in self.waves]) / RATE_HZ
        edge = np.searchsorted(EDGES_S, seconds)
        while True:
            batches = []
            for e in range(len(EDGES_S)):
                rows = rng.permutation(np.flatnonzero(edge == e))
                batches += [rows[i : i + ROWS] for i in range(0, len(rows) - ROWS + 1, ROWS)]
            for i in rng.permutation(len(batches)):
                yield batches[i]

    def arrays(self, rows: np.ndarray, model: CTCModel) -> dict[str, np.ndarray]:
        """Pads a batch: audio, its lengths, phonemes of each part of a frame, and labels."""
        longest = max(len(self.waves[i]) for i in rows) / RATE_HZ
        samples = int(EDGES_S[np.searchsorted(EDGES_S, longest)] * RATE_HZ)
        frames = model.frame_count(samples)
        hop_s = model.frame_samples / RATE_HZ
        # a frame of the encoder is centred on its first sample
        middles_s = ((np.arange(frames * PARTS) + 0.5) / PARTS - 0.5) * hop_s
        audio = np.zeros((len(rows), samples), np.float32)
        phonemes = np.full((len(rows), frames * PARTS), len(self.names))
        labels = np.zeros((len(rows), max(map(len, self.labels))), np.int32)
        for row, i in enumerate(rows):
            audio[row, : len(self.waves[i])] = self.waves[i] / 32768.0
            place = np.searchsorted(self.starts_s[i], middles_s, side="right") - 1
            phonemes[row] = np.where(place >= 0, self.phonemes[i][place], len(self.names))
            labels[row, : len(self.labels[i])] = self.labels[i]
        return {
            "audio": audio,
            "audio_lengths": np.array([len(self.waves[i]) for i in rows], np.int32),
            "phonemes": phonemes.reshape(len(rows), frames, PARTS).astype(np.int32),
            "labels": labels,
            "label_lengths": np.array([len(self.labels[i]) for i in rows], np.int32),
        }


def losses(
    network: PhoneticNetwork, batch: dict[str, jax.Array], keys: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[dict[str, jax.Array], dict[str, jax.Array]]]:
    """Cross-entropy per part of a frame and CTC per label, weighted by `weights` [2].

    Returns the sum and (metrics, new batch-norm statistics).
    """
    phonetic, logits, encoded = network.phonetic_logits(
        batch["audio"], batch["audio_lengths"], keys
    )
    log_probs = jax.nn.log_softmax(phonetic)
    wanted = batch["phonemes"][..., None]
    is_frame = jnp.arange(log_probs.shape[1])[None] < encoded.lengths[:, None]
    picked = jnp.take_along_axis(log_probs, wanted, axis=-1)[..., 0].mean(axis=-1)
    naming = -jnp.sum(picked * is_frame) / jnp.sum(is_frame)
    right = (jnp.argmax(log_probs, axis=-1) == batch["phonemes"]).mean(axis=-1)
    totals, _ = ctc_loss(logits, encoded.lengths, batch["labels"], batch["label_lengths"])
    spelling = jnp.sum(totals) / jnp.sum(batch["label_lengths"])
    accuracy = jnp.sum(right * is_frame) / jnp.sum(is_frame)
    statistics = {f"encoder.{path}": value for path, value in encoded.statistics.items()}
    metrics = {"phonemes": naming, "accuracy": accuracy, "ctc": spelling}
    return weights[0] * naming + weights[1] * spelling, (metrics, statistics)


def pretrain(model: CTCModel, rounds: Sequence[Round], state_file: Path) -> Variables:
    """Trains one round after the other, going on from `state_file` if it is there.

    Returns the CTC network's part. The state is saved every 500 steps.
    """
    ends = np.cumsum([r.steps for r in rounds])
    starts = ends - [r.steps for r in rounds]
    speech = Speech.read(rounds[0].manifest, model)
    trainer = _Trainer(model, speech.names, rounds, state_file)
    for r, start, end in zip(rounds, starts, ends, strict=True):
        if trainer.done < end:
            if r is not rounds[0]:
                speech = Speech.read(r.manifest, model, speech.names)
            trainer.run(speech, r, int(start), int(end))
    return trainer.variables


class _Trainer:
    """The state of a training, and its step."""

    def __init__(
        self, model: CTCModel, names: Sequence[str], rounds: Sequence[Round], state_file: Path
    ):
        self.model, self.state_file = model, state_file
        network = PhoneticNetwork(model.architecture, len(names) + 1, rngs=nnx.Rngs(0))
        self.graphdef, variables = split(network)
        trained = {p: v for p, v in variables.items() if model.trainable.get(p, True)}
        buffers = {p: v for p, v in variables.items() if p not in trained}
        adamw = optax.adamw(_schedule(rounds), b1=0.9, b2=0.98, weight_decay=1e-3)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)
        self.state: Any = (trained, self.optimizer.init(trained), buffers)
        self.done = 0
        if state_file.exists():
            saved = np.load(state_file)
            leaves = [saved[f"leaf{i}"] for i in range(len(saved) - 1)]
            self.state = jax.tree.unflatten(jax.tree.structure(self.state), leaves)
            self.done = int(saved["done"])

    @property
    def variables(self) -> Variables:
        """Parameters and buffers of the CTC network, without the phonemes' head."""
        values = {**self.state[0], **self.state[2]}
        return {path: value for path, value in values.items() if path in self.model.infos}

    @partial(jax.jit, static_argnums=0, donate_argnums=1)
    def step(
        self, state: Any, batch: dict[str, jax.Array], number: jax.Array, weights: jax.Array
    ) -> tuple[Any, Any]:
        """One step of AdamW on the weighted losses."""
        trained, moments, buffers = state
        rows = batch["audio"].shape[0]
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), number), rows)

        def total(trained: Variables) -> tuple[jax.Array, Any]:
            return losses(merge(self.graphdef, {**trained, **buffers}), batch, keys, weights)

        gradients, (metrics, statistics) = jax.grad(total, has_aux=True)(trained)
        updates, moments = self.optimizer.update(gradients, moments, trained)
        return (optax.apply_updates(trained, updates), moments, {**buffers, **statistics}), metrics

    def run(self, speech: Speech, r: Round, start: int, end: int) -> None:
        """Steps `start` to `end` of the whole training; those that are done are left out."""
        weights = np.array([r.phonetic_weight, r.ctc_weight], np.float32)
        batches = speech.batches(seed=start)
        for _ in range(start, self.done):
            next(batches)
        with ThreadPoolExecutor(1) as pool:
            load = partial(speech.arrays, model=self.model)
            ahead = [pool.submit(load, next(batches)) for _ in range(AHEAD)]
            for n in (bar := tqdm(range(max(self.done, start), end), initial=self.done, total=end)):
                ahead.append(pool.submit(load, next(batches)))
                self.state, metrics = self.step(self.state, ahead.pop(0).result(), n, weights)
                if n % 20 == 0:
                    bar.set_postfix({k: f"{float(value):.2f}" for k, value in metrics.items()})
                if (n + 1) % SAVE_EVERY == 0 or n + 1 == end:
                    _save(self.state_file, self.state, n + 1)
        self.done = max(self.done, end)


def _schedule(rounds: Sequence[Round]) -> optax.Schedule:
    """The rounds' rates one after the other, after a warm-up."""
    parts = [optax.linear_schedule(0.0, rounds[0].rates[0], WARMUP_STEPS)]
    steps = [WARMUP_STEPS, *(r.steps for r in rounds)]
    steps[1] -= WARMUP_STEPS
    for r, count in zip(rounds, steps[1:], strict=True):
        parts.append(optax.cosine_decay_schedule(r.rates[0], count, r.rates[1] / r.rates[0]))
    return optax.join_schedules(parts, list(np.cumsum(steps)[:-1]))


def _save(path: Path, state: Any, done: int) -> None:
    """Writes the state whole or not at all."""
    leaves = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, done=done, **leaves)
    unfinished.replace(path)
