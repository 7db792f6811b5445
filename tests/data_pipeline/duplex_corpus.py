"""A small corpus of conversations of two voices, as Lhotse cuts and as SHAR."""

from pathlib import Path

import numpy as np
import soundfile

from speechlm2_jax.data import DataModule, DuplexS2SDataset, Tokenizer

TOKENIZER = Tokenizer(Path(__file__).parents[1] / "data" / "duplex" / "assets" / "llm")
BLOCK = {
    "frame_length": 0.08,
    "source_sample_rate": 16000,
    "target_sample_rate": 22050,
    "input_roles": ["user", "User"],
    "output_roles": ["agent", "Assistant"],
}


def frames(samples: int) -> int:
    """A speech encoder of one frame per 80 ms."""
    return -(-samples // 1280)


def recording(folder, name, seconds, rate_hz, channels=1):
    """A Lhotse recording of noise; a second channel is the first, negated."""
    from lhotse import Recording

    random = np.random.default_rng(sum(map(ord, name)))
    wave = random.uniform(-0.3, 0.3, round(seconds * rate_hz)).astype(np.float32)
    path = folder / f"{name}.wav"
    soundfile.write(path, np.stack([wave, -wave][:channels], axis=1), rate_hz)
    return Recording.from_file(path)


def cut(folder, name, seconds=1.0, turns=None, *, agent_hz=22050, agent_s=None, **more):
    """A cut of a user and an agent; `turns` are (speaker, start, end, text)."""
    from lhotse import MonoCut, SupervisionSegment

    if turns is None:
        turns = [("user", 0.0, seconds / 2, "hi"), ("agent", seconds / 2, seconds, f"ok {name}")]
    source = recording(folder, f"{name}_user", seconds, 16000)
    target = recording(folder, f"{name}_agent", agent_s or seconds, agent_hz)
    spoken = [
        SupervisionSegment(f"{name}-{n}", source.id, a, round(b - a, 6), text=text, speaker=who)
        for n, (who, a, b, text) in enumerate(turns)
    ]
    values = {"channel": 0, "recording": source, "custom": {"target_audio": target}, **more}
    return MonoCut(name, 0.0, seconds, supervisions=spoken, **values)


def write_cuts(path, cuts):
    """Writes a manifest of cuts."""
    from lhotse import CutSet

    CutSet.from_cuts(cuts).to_file(path)
    return {"cuts_path": str(path)}


def write_shar(folder, cuts, **more):
    """Writes SHAR with the fields of duplex data."""
    from lhotse import CutSet

    folder.mkdir()
    fields = {"recording": "wav", "target_audio": "flac"}
    CutSet.from_cuts(cuts).to_shar(folder, fields, warn_unused_fields=False, **more)
    return {"shar_path": str(folder)}


def corpus(folder, n=13):
    """Conversations of 0.3 to 2.2 s."""
    lengths = np.random.default_rng(1).uniform(0.3, 2.2, n)
    return [cut(folder, f"c{i:02d}", round(float(s), 3)) for i, s in enumerate(lengths)]


def module(
    source, groups=1, own_groups=None, validation=(), block=BLOCK, max_frames=None, **settings
):
    """A data module that is ready to give batches."""
    train = {**source, "sample_rate": 22050, "seed": 3, **settings}
    if not {"batch_size", "batch_duration"} & set(settings):
        train["batch_size"] = 3
    cfg = {**block, "train_ds": train}
    if validation:
        sets = {name: source for name in validation}
        cfg["validation_ds"] = {"sample_rate": 22050, "batch_size": 2, "datasets": sets}
    made = DataModule(cfg, TOKENIZER, DuplexS2SDataset.from_config(cfg, TOKENIZER, max_frames))
    made.setup(frame_count=frames, groups=groups, own_groups=own_groups)
    return made


PER_ROW = ("source_audio", "target_audio", "target_tokens", "source_tokens")


def rows(batch):
    """By the id of its conversation: the row's arrays without padding."""
    arrays, found = batch.arrays, {}
    used = [tuple(place) for place in np.argwhere(arrays.source_lengths > 0).tolist()]
    for name, place in zip(batch.ids, used, strict=True):
        lengths = [arrays.source_lengths, arrays.target_lengths, *[arrays.token_lengths] * 2]
        found[name] = {
            field: getattr(arrays, field)[place][: length[place]]
            for field, length in zip(PER_ROW, lengths, strict=True)
        }
    return found
