"""From an entry of `input_cfg` to conversations of two voices, by its type."""

import logging
from collections import Counter
from collections.abc import Iterator

from speechlm2_jax.data.duplex.config import DuplexLoaderConfig
from speechlm2_jax.data.duplex.conversations import DuplexConversation
from speechlm2_jax.data.duplex.forms import DuplexForm, form_of, recording_options
from speechlm2_jax.data.duplex.readers import duplex_cuts
from speechlm2_jax.data.entry_readers import recordings
from speechlm2_jax.data.input_config import InputConfig
from speechlm2_jax.data.manifest_values import located
from speechlm2_jax.data.paths import expand_shards

_log = logging.getLogger(__name__)


def read_duplex_entry(
    entry: InputConfig, config: DuplexLoaderConfig, *, has_agent: bool = True
) -> Iterator[DuplexConversation]:
    """The conversations of an entry that is no group, in order. Raises SettingsError.

    Without `has_agent` the agent's recordings are left out, as in `form_of`.
    """
    form = form_of(entry, config, has_agent=has_agent)
    if form.reads_cuts:
        yield from _of_cuts(entry, form)
        return
    for conversation in recordings(entry, recording_options(entry, config)):
        with located(conversation.where):
            made = form.of_recording(conversation)
        yield made


def _of_cuts(entry: InputConfig, form: DuplexForm) -> Iterator[DuplexConversation]:
    left_out: Counter[str] = Counter()
    for one in duplex_cuts(entry.shar_path, expand_shards(entry.manifests), form.fields):
        with located(one.where):
            fault, made = form.fault(one.cut), form.of_cut(one)
        if fault is not None:
            left_out[fault] += 1
        if made is not None:
            yield made
    if left_out:
        counts = ", ".join(f"{fault}: {count}" for fault, count in left_out.items())
        _log.warning("%s: cuts are left out by %s", entry.type, counts)
