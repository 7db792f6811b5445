"""Is a data set a stream? And its batches."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from speechlm2_jax.batches import FrameCount
from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.faults import Faults
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.manifest_watch import ManifestWatch
from speechlm2_jax.data.prepare import DataSet, Prepared, seed_of
from speechlm2_jax.data.sources import read_sources
from speechlm2_jax.data.storage.addresses import is_remote
from speechlm2_jax.data.streams.plan import StreamSampler, plan_stream
from speechlm2_jax.data.streams.shards import StreamRows, tars_of
from speechlm2_jax.settings import SettingsError

if TYPE_CHECKING:  # Grain is loaded with the first batches
    from speechlm2_jax.data.streams.batches import StreamBatches

_log = logging.getLogger(__name__)
_NOT_WITH = ("packed", "concatenate_samples", "cut_text_into_windows_tokens")


def reads_in_order(config: LoaderConfig, where: str, dataset: object, *, is_train: bool) -> bool:
    """Whether a data set is read as a stream: `stream: true`, or tars of other machines.

    Raises SettingsError for `stream: true` of what cannot be a stream.
    """
    if config.stream is False:
        return False
    entries: list[InputConfig] = []

    def collect(entry: InputConfig, config: LoaderConfig) -> StreamRows:
        entries.append(entry)
        return StreamRows(shards=())  # nothing is copied

    if config.stream is None and not is_train:
        return False
    try:
        read_sources(config, where, collect)
    except SettingsError:
        if config.stream is None:  # told when the manifests are read
            return False
        raise
    fault = _fault(entries, config, dataset, is_train=is_train)
    if config.stream:
        if fault:
            raise SettingsError(f"{where}.stream: {fault}")
        return True
    if fault or not any(is_remote(tar) for entry in entries for tar in tars_of(entry)):
        return False
    _log.info(
        "%s: its tars are remote, so they are read from front to end; stream: false reads them at "
        "random",
        where,
    )
    return True


def _fault(
    entries: list[InputConfig], config: LoaderConfig, dataset: object, *, is_train: bool
) -> str:
    """Why a data set cannot be a stream; empty if it can."""
    if not is_train:
        return "validation and test sets are finite and read at random; remove it"
    if not hasattr(dataset, "stream"):
        return "the data of this model is read at random; remove it"
    given = [key for key in _NOT_WITH if getattr(config, key, None)]
    if given:
        return f"{given[0]} needs all examples of a data set at once; use one of them"
    other = next((entry for entry in entries if not entry.has_shards), None)
    if other is not None:
        name = (other.manifests or ("an entry",))[0]
        return f"{name} is not in tars; give nemo_tarred or SHAR, or remove it"
    return ""


def is_stream(data_set: DataSet) -> bool:
    """Whether a data set was opened as a stream."""
    return any(isinstance(source.conversations, StreamRows) for source in data_set.sources)


def prepare_stream(
    data_set: DataSet, dataset: Any, frame_count: FrameCount, groups: int, multiple: int
) -> Prepared:
    """Plans a stream by a sample of its rows. Raises SettingsError."""
    seed = seed_of(data_set.config, data_set.where)
    contents, sampler = plan_stream(data_set, dataset, frame_count, groups, multiple, seed)
    return Prepared(contents=contents, sampler=sampler, filtered={}, config=data_set.config)


def stream_batches(
    data_set: DataSet,
    prepared: Prepared,
    dataset: Any,
    groups: int,
    own_groups: Iterable[int] | None,
    faults: Faults,
    watch: ManifestWatch | None = None,
) -> "StreamBatches":
    """The training batches of a stream, from the start."""
    from dataclasses import replace

    from speechlm2_jax.data.streams.batches import StreamBatches
    from speechlm2_jax.data.streams.reader import StreamReader

    assert isinstance(prepared.sampler, StreamSampler)
    reader = StreamReader(
        dataset=dataset,
        contents=prepared.contents,
        sampler=replace(prepared.sampler, groups=groups),
        augmentation=data_set.augmentation,
        timeout_s=prepared.config.read_timeout,
    )
    return StreamBatches(reader, own_groups, faults, prepared.config.num_workers, watch)
