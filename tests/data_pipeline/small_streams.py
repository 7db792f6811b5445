"""Shards of a small stream, and the batches that hosts read of it."""

import json
from dataclasses import fields

import numpy as np

from speechlm2_jax.data import DataModule
from tests.data_pipeline.small_corpus import (
    TAG,
    frames,
    wav_bytes,
    write_lines,
    write_tar,
)

RATE = 16000


def write_shards(folder, shards, members, more=None):
    """Shards of recordings of 0.1 to 0.5 s; the level of each is its number."""
    random = np.random.default_rng(3)
    for shard in range(shards):
        names = [f"s{shard:02d}m{n:02d}.wav" for n in range(members)]
        seconds = random.choice([0.1, 0.2, 0.3, 0.5], members).tolist()
        data = [
            (name, wav_bytes(s, (shard * members + n + 1) / 1000))
            for n, (name, s) in enumerate(zip(names, seconds, strict=True))
        ]
        write_tar(folder / f"audio_{shard}.tar", data)
        rows = [
            {"audio_filepath": name, "duration": s, "text": "x" * int(10 * s), **(more or {})}
            for name, s in zip(names, seconds, strict=True)
        ]
        write_lines(folder / f"manifest_{shard}.jsonl", *rows)
    return entry(folder, shards)


def entry(folder, shards, **more):
    return {
        "type": "nemo_tarred",
        "manifest_filepath": f"{folder}/manifest_{{0..{shards - 1}}}.jsonl",
        "tarred_audio_filepaths": f"{folder}/audio_{{0..{shards - 1}}}.tar",
        "audio_locator_tag": TAG,
        **more,
    }


def stream_module(tokenizer, *entries, groups=4, own=None, **settings):
    """A module over a stream, for some groups and those of them that are read here."""
    train = {
        **{"prompt_format": "qwen", "token_equivalent_duration": 0.08, "batch_size": 2},
        **{"shuffle": True, "seed": 3, "shuffle_buffer_size": 12, "stream": True},
        **{"input_cfg": list(entries), **settings},
    }
    module = DataModule({"train_ds": train}, tokenizer)
    module.setup(frame_count=frames, groups=groups, own_groups=own)
    return module


def streams_of(module_of, hosts, *entries, groups=4, state=None, **settings):
    """The batches of each host, which hold groups as a mesh deals them out."""
    size = groups // hosts
    made = [
        module_of(*entries, groups=groups, own=range(h * size, (h + 1) * size), **settings)
        for h in range(hosts)
    ]
    return [module.train_batches(state) for module in made]


def global_batches(streams, count):
    """So many batches: the bucket, the ids, and the arrays of each group."""
    found, size = [], streams[0]._reader.sampler.groups // len(streams)
    for _ in range(count):
        parts = [next(stream) for stream in streams]
        assert len({part.bucket for part in parts}) == 1
        arrays = {
            field.name: np.concatenate(
                [
                    np.asarray(getattr(part.arrays, field.name))[h * size : (h + 1) * size]
                    for h, part in enumerate(parts)
                ]
            )
            for field in fields(parts[0].arrays)
            if not field.metadata.get("static")
        }
        found.append((parts[0].bucket, [i for part in parts for i in part.ids], arrays))
    return found


def merged(streams):
    states = [stream.get_state() for stream in streams]
    return json.loads(json.dumps(streams[0].joined_state(states)))


def closing(streams):
    for stream in streams:
        stream.close()


def assert_equal(one, other):
    for (bucket, ids, arrays), (other_bucket, other_ids, others) in zip(one, other, strict=True):
        assert bucket == other_bucket and ids == other_ids
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, others[name], err_msg=name)
