"""Reads the manifests of noise."""

import os
from collections.abc import Mapping

from speechlm2_jax.data.augmentation.noise import NoiseSource
from speechlm2_jax.data.config import DataLoaderConfig, LoaderConfig
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import checked_path
from speechlm2_jax.data.salm_dataset import SALMDataset
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.settings import SettingsError, build

_YAML = (".yaml", ".yml")


def read_noise(config: LoaderConfig, where: str) -> list[NoiseSource]:
    """The recordings behind `noise_path`; none without it.

    Without weights, each recording has the same chance. Raises SettingsError, naming the key.
    """
    if config.noise_path is None:
        return []
    place = f"{where}.noise_path"
    with located(place):
        source_keys = _keys(config.noise_path)
    keys = {
        "batch_size": 1,
        "sample_rate": config.sample_rate,
        "allowed_roots": config.allowed_roots,
        "allowed_schemes": config.allowed_schemes,
        "read_timeout": config.read_timeout,
        **source_keys,
    }
    sources = read_sources(build(DataLoaderConfig, keys, place), place, SALMDataset.read)
    found: list[NoiseSource] = []
    for source in sources:
        clips = [clip for c in source.conversations for clip in c.clips if clip.duration_s > 0]
        share = len(clips) if source.share is None else source.share
        if clips:
            found.append(NoiseSource(clips=clips, share=share))
    if not found:
        raise SettingsError(f"{place}: no recording of noise is in it")
    return found


def _keys(path: str | Mapping[str, object]) -> dict[str, object]:
    """The keys of a source that a path stands for."""
    if isinstance(path, Mapping):
        return dict(path)
    if path.endswith(_YAML):
        return {"input_cfg": path}
    # what settings do not allow is not even looked for
    is_folder = not is_remote(path) and os.path.isdir(checked_path(path))
    return {"shar_path" if is_folder else "manifest_filepath": path}
