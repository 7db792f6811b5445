"""The blocks of `data`: its sets by name, and each as a configured data set."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from speechlm2_jax.data.augmentation.augmentation import Augmentation, make_augmentation
from speechlm2_jax.data.augmentation.config import warn_without_switch
from speechlm2_jax.data.augmentation.noise_sources import read_noise
from speechlm2_jax.data.config import DataConfig, LoaderConfig
from speechlm2_jax.data.index.row_count import is_large, tell_of_memory
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.prepare import DataSet, seed_of
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.data.storage.access import using
from speechlm2_jax.data.streams.opening import reads_in_order
from speechlm2_jax.data.streams.shards import StreamRows
from speechlm2_jax.settings import SettingsError, build, report_ignored

_OF_STREAMS = {
    "shuffle_buffer_size": "of streams; order is shuffled over the whole of the data",
    "num_cuts_for_bins_estimate": "of streams; bins are measured over the whole of the data",
}
"""Keys that streams alone read -> why others need none."""


def read_data_set(
    dataset: Any, values: Mapping[str, object], where: str, *, is_train: bool
) -> DataSet:
    """Reads the keys and manifests of a set. Raises SettingsError."""
    config = build(dataset.loader_config, values, where)
    warn_without_switch(config, where)
    if not is_train and getattr(config, "concatenate_samples", False):
        raise SettingsError(f"{where}.concatenate_samples: each conversation is scored alone")
    if not is_train and getattr(config, "packed", False):
        raise SettingsError(f"{where}.packed: each conversation is scored alone; remove it")
    is_stream = reads_in_order(config, where, dataset, is_train=is_train)
    for key, reason in _OF_STREAMS.items():
        if key in values and not is_stream:
            report_ignored(f"{where}.{key}", reason)
    has_index = not is_stream and is_large(config, where)

    def read(entry: InputConfig, config: Any) -> Sequence[Any]:
        if is_stream:
            return dataset.stream(entry, config)
        rows = dataset.index(entry, config) if has_index else None
        return dataset.read(entry, config) if rows is None else rows

    def variants(conversations: Sequence[Any]) -> Sequence[Any]:
        is_list = not isinstance(conversations, StreamRows)
        return dataset.variants(conversations, config) if is_list else conversations

    augmentation = _augmentation(config, where)
    sources = tuple(
        replace(source, conversations=variants(source.conversations))
        for source in read_sources(config, where, read)
    )
    if not is_stream:
        tell_of_memory(where, sources)
    return DataSet(
        where=where,
        config=config,
        sources=sources,
        is_train=is_train,
        augmentation=augmentation,
    )


def _augmentation(config: LoaderConfig, where: str) -> Augmentation | None:
    """The random effects of a data set. Raises SettingsError for noise that cannot be read."""
    with using(config.storage):
        return make_augmentation(config, seed_of(config, where), read_noise(config, where))


def shared_keys(config: DataConfig) -> dict[str, object]:
    """The keys of the `data` block that hold for each of its sets."""
    names = ("allowed_roots", "allowed_schemes")
    return {name: value for name in names if (value := getattr(config, name)) is not None}


def named_sets(
    values: Mapping[str, object] | None, block: str
) -> dict[str, tuple[Mapping[str, Any], str]]:
    """The sets of `validation_ds` or `test_ds`: by name, their keys and where these are.

    Those under `datasets` inherit the keys beside it; without it there is one set, `default`.
    Raises SettingsError for what is no mapping.
    """
    if values is None:
        return {}
    where = f"data.{block}"
    if "datasets" not in values:
        return {"default": (values, where)}
    sets, common = values["datasets"], {k: v for k, v in values.items() if k != "datasets"}
    if not isinstance(sets, Mapping) or not sets:
        raise SettingsError(f"{where}.datasets: expected a mapping of names to data sets")
    for name, own in sets.items():
        if not isinstance(own, Mapping):
            raise SettingsError(f"{where}.datasets.{name}: expected a mapping of keys")
    return {
        str(name): ({**common, **own}, f"{where}.datasets.{name}") for name, own in sets.items()
    }
