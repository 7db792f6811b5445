"""Data of several kinds, a twentieth of it broken, with weights and augmentation."""

import io
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml

from speechlm2_jax.data import DataModule, SALMDataset
from tests.data_pipeline.small_corpus import (
    assert_same,
    frames,
    wav_bytes,
    write_lines,
    write_tar,
)

RATE_HZ = 16000
PER_SOURCE = 40
DAMAGES = ("missing", "unreadable", "empty", "not_finite", "truncated", "longer_than_declared")
KINDS = ("files", "tars", "shar")


def damaged(cause, seconds, value):
    """The bytes of a recording that cannot be used; None: there is none."""
    good = wav_bytes(seconds, value)
    buffer = io.BytesIO()
    wave = np.full(round(seconds * RATE_HZ), value, np.float32)
    wave[7] = np.nan
    soundfile.write(buffer, wave, RATE_HZ, format="WAV", subtype="FLOAT")
    return {
        "missing": None,
        "unreadable": b"no audio at all" * 40,
        "empty": wav_bytes(0.0, value),
        "not_finite": buffer.getvalue(),
        "truncated": good[: len(good) // 2],
        "longer_than_declared": wav_bytes(3 * seconds, value),
    }[cause]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """By kind: an entry of 40 recordings, and what is wrong with two of them."""
    folder = tmp_path_factory.mktemp("broken")
    made, broken = {}, {}
    causes = iter(DAMAGES)
    for kind in KINDS:
        rows, members = [], []
        wrong = {9: next(causes), 31: next(causes)}
        if kind != "files":  # a member that is missing is an error of the tar's manifest
            wrong = {n: "unreadable" if c == "missing" else c for n, c in wrong.items()}
        for n in range(PER_SOURCE):
            name, seconds, value = f"{kind}{n:02d}", 0.3 + 0.01 * n, (n + 1) / 80
            row = {"audio_filepath": f"{name}.wav", "duration": seconds, "text": "x" * (1 + n % 5)}
            rows.append(row | {"sampling_rate": RATE_HZ, "id": name})
            data = damaged(wrong[n], seconds, value) if n in wrong else wav_bytes(seconds, value)
            if data is not None:
                members.append((f"{name}.wav", data))
        broken |= {f"{kind}{n:02d}": cause for n, cause in wrong.items()}
        made[kind] = {"files": of_files, "tars": of_tars, "shar": of_shar}[kind](
            folder, rows, members
        )
    return made, broken


def of_files(folder, rows, members):
    for name, data in members:
        (folder / name).write_bytes(data)
    return {"type": "nemo", "manifest_filepath": write_lines(folder / "files.jsonl", *rows)}


def of_tars(folder, rows, members):
    half = PER_SOURCE // 2
    for shard in range(2):
        part = slice(shard * half, (shard + 1) * half)
        write_tar(folder / f"audio_{shard}.tar", members[part])
        write_lines(folder / f"manifest_{shard}.jsonl", *rows[part])
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder}/manifest__OP_0..1_CL_.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio__OP_0..1_CL_.tar",
    }


def of_shar(folder, rows, members):
    shar = folder / "shar"
    shar.mkdir()
    write_tar(shar / "recording.000000.tar", members)
    cuts = [
        {
            "id": row["id"],
            "start": 0,
            "duration": row["duration"],
            "channel": 0,
            "type": "MonoCut",
            "supervisions": [
                {
                    "id": row["id"],
                    "recording_id": row["id"],
                    "start": 0,
                    "duration": row["duration"],
                    "text": row["text"],
                }
            ],
            "recording": {
                "id": row["id"],
                "sampling_rate": RATE_HZ,
                "num_samples": round(row["duration"] * RATE_HZ),
                "duration": row["duration"],
                "sources": [{"type": "shar", "channels": [0], "source": ""}],
            },
        }
        for row in rows
    ]
    write_lines(shar / "cuts.000000.jsonl", *cuts)
    return {"shar_path": str(shar)}


def module_of(sources, tokenizer, errors=None, groups=2, **keys):
    entries = [dict(entry) for entry in sources[0].values()]
    cfg = {"input_cfg": entries, "prompt_format": "qwen", "token_equivalent_duration": 0.08}
    cfg |= {"shuffle": True, "batch_size": 4, "seed": 5, "num_workers": 2, **keys}
    module = DataModule({"train_ds": cfg}, tokenizer, SALMDataset(tokenizer))
    module.setup(frame_count=frames, groups=groups)
    module.keep_errors(errors)
    return module


def test_a_twentieth_of_every_kind_is_broken_and_training_goes_on(sources, tokenizer, tmp_path):
    _, broken = sources
    errors = tmp_path / "data_errors.jsonl"
    module = module_of(sources, tokenizer, errors)
    stream = module.train_batches()
    batches = list(islice(stream, 2 * 15))  # two epochs of 120 conversations
    assert stream.get_state()["epoch"] == 1
    assert all(len(batch.ids) == 8 for batch in batches)
    assert module.dropped == {cause: 2 * n for cause, n in Counter(broken.values()).items()}
    rows = [json.loads(line) for line in errors.read_text().splitlines()]
    for epoch in range(2):
        own = [row for row in rows if row["epoch"] == epoch]
        assert {row["id"].removesuffix(".wav"): row["cause"] for row in own} == broken
        assert len(own) == len(broken)
    assert all(row["path"] and row["replaced_by"] for row in rows)


NEMO_YAML = """
data:
  train_ds:
    use_lhotse: true
    sample_rate: 16000
    prompt_format: qwen
    token_equivalent_duration: 0.08
    input_cfg:
      - type: group
        weight: 1
        tags: {task: asr}
        input_cfg:
          - type: nemo
            manifest_filepath: FOLDER/files.jsonl
            weight: 1.0
            tags: {context: "Transcribe:"}
      - type: group
        weight: 2
        input_cfg:
          - type: nemo_tarred
            manifest_filepath: FOLDER/manifest__OP_0..1_CL_.jsonl
            tarred_audio_filepaths: FOLDER/audio__OP_0..1_CL_.tar
            weight: 30
      - type: group
        weight: 1
        input_cfg:
          - type: lhotse_shar
            shar_path: FOLDER/shar
            weight: 0.5
            tags: {context: "Repeat after me:"}
    seed: 42
    shard_seed: randomized
    shuffle: true
    shuffle_buffer_size: 10000
    num_workers: 2
    pin_memory: true
    noise_path: FOLDER/noise.json
    noise_snr: [5, 15]
    noise_mix_prob: 0.5
    perturb_speed: true
    batch_size: null
    use_multimodal_sampling: true
    use_bucketing: true
    bucket_buffer_size: 20000
    concurrent_bucketing: true
    min_tokens: 2
    max_tokens: 500
BINS
"""
BINS = {
    "1-D": """
    num_buckets: 3
    bucket_duration_bins: [20, 28, 40]
    bucket_batch_size: [4, 3, 2]""",
    "2-D": """
    num_buckets: 4
    bucket_duration_bins: [[16, 9], [16, 12], [22, 12], [30, 12]]
    bucket_batch_size: [5, 4, 3, 2]
    bucketing_2d_strict_mode: true""",
    "2-D with max_tpt": """
    num_buckets: 3
    bucket_duration_bins: [[16, 12], [22, 12], [30, 12]]
    bucket_batch_size: [4, 3, 2]
    max_tpt: [0.9, 2.0, 2.0]""",
}


@pytest.fixture(params=BINS)
def bins(request):
    """The name of some settings of bins."""
    return request.param


@pytest.fixture
def nemo_module(bins, sources, tokenizer):
    """Makes a data module by NeMo's keys alone, of which only the paths are changed."""
    folder = Path(sources[0]["files"]["manifest_filepath"]).parent
    wave = np.random.default_rng(0).normal(0, 0.1, 5 * RATE_HZ)
    soundfile.write(folder / "noise.wav", wave, RATE_HZ)
    write_lines(
        folder / "noise.json", {"audio_filepath": "noise.wav", "duration": 5.0, "text": "-"}
    )
    text = NEMO_YAML.replace("BINS", BINS[bins]).replace("FOLDER", str(folder))

    def make():
        data = yaml.safe_load(text)["data"]
        module = DataModule(data, tokenizer, SALMDataset(tokenizer))
        module.setup(frame_count=frames, groups=2)
        return module

    return make


def test_a_nemo_yaml_of_weighted_groups_tars_noise_speed_and_bins_runs_and_resumes(
    nemo_module, bins
):
    module = nemo_module()
    lengths = [c.lengths for c in module.prepared().contents.conversations]
    ratios = [one.output_tokens / one.input_tokens for one in lengths if one.input_tokens <= 16]
    (source,) = module._sets.values()
    left_out = sum(len(one.conversations) for one in source.sources) - len(lengths)
    assert module.dropped == ({"longer_than_buckets": left_out} if "max_tpt" in bins else {})
    assert (max(ratios) <= 0.9) == (left_out > 0) == ("max_tpt" in bins)
    buckets = {batch.bucket for batch in module.plans()}
    assert len(buckets) == len(module.plan().buckets) == (4 if bins == "2-D" else 3)
    stream = module.train_batches()
    batches, states = [], []
    for batch in islice(stream, 60):
        batches.append(batch)
        states.append(json.loads(json.dumps(stream.get_state())))
    kinds = Counter(name[:4] for batch in batches for name in batch.ids)
    shares = [kinds[kind] / kinds.total() for kind in ("file", "tars", "shar")]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.05)  # of what fits a bin
    speeds = Counter(name.partition("_")[2] for batch in batches for name in batch.ids)
    assert set(speeds) == {"", "sp0.9", "sp1.1"}
    assert min(speeds.values()) > 0.25 * speeds.total()
    resumed = nemo_module().train_batches(states[40])
    for batch in batches[41:44]:
        assert_same(next(resumed), batch)
