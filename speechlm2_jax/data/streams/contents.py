"""What the shards of a stream hold, and which settings choose of it, in one number.

So a change while a run was stopped is told when it resumes.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial

import xxhash

from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.index.folders import state_of_file
from speechlm2_jax.data.paths import local_file
from speechlm2_jax.data.storage.access import StorageAccess, using
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.streams.events import Pool
from speechlm2_jax.data.streams.shards import PoolShard
from speechlm2_jax.settings import SettingsError

SAMPLED_SHARDS = 16
"""Of each pool, spread over all: blocks of their manifests are read, and remote tars asked for."""
_AT_ONCE = 8
_CHANGE_NOTHING = (
    *("num_workers", "worker_processes", "read_timeout", "max_error_rate"),
    *("allowed_roots", "allowed_schemes"),
    *("input_cfg", "cuts_path", "manifest_filepath", "tarred_audio_filepaths", "shar_path"),
)
"""Settings that change no example, and paths: shards are compared by their names elsewhere."""


def contents_of(pools: Sequence[Pool], config: LoaderConfig) -> str:
    """A text that changes with the shards of a stream and with what is made of them.

    Of local files the sizes count, of a sample of manifests their bytes, of the remote tars among
    these the versions. Times do not: they differ between hosts with copies of their own.
    """
    digest = xxhash.xxh3_64()
    for pool in pools:
        step = -(-len(pool.shards) // SAMPLED_SHARDS)
        sampled = pool.shards[::step]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="contents") as threads:
            found = list(threads.map(partial(_sample, pool.storage), sampled))
        sizes = [(_size(one.shard.name), _size(one.shard.tar)) for one in pool.shards]
        options = {repr((one.shard.options, one.fields, one.skip_missing)) for one in pool.shards}
        digest.update(repr((found, sizes, sorted(options))).encode("utf-8", "replace"))
    chosen = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name not in _CHANGE_NOTHING
    }
    digest.update(repr(chosen).encode("utf-8", "replace"))
    return digest.hexdigest()


def _sample(storage: StorageAccess, one: PoolShard) -> tuple[str, str]:
    """A checksum of the manifest of a shard, and the version of its tar if that is remote."""
    name, tar = one.shard.name, one.shard.tar
    manifest = version = ""
    try:
        with using(storage):
            manifest = str(state_of_file(local_file(name))["sample"])
        if is_remote(tar):
            state = storage.open(tar).state()
            version = f"{state.size} {state.version}"
    except (SettingsError, OSError):  # told where it is read
        pass
    return manifest, version


def _size(path: str) -> int | None:
    """The bytes of a local file."""
    try:
        return None if is_remote(path) else os.stat(path).st_size
    except OSError:
        return None
