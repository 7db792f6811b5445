"""What the settings of a training tell to those who use its model."""

from collections.abc import Iterator, Mapping
from typing import Any


def first_tag(settings: Mapping[str, Any], name: str) -> str | None:
    """The first value of a tag (context, system_prompt) among the training sources."""
    found = ((source.get("tags") or {}).get(name) for source in sources(train_block(settings)))
    return next((str(value) for value in found if value is not None), None)


def longest_audio_s(settings: Mapping[str, Any]) -> float | None:
    """The longest recording of the training, if its settings say so."""
    longest = train_block(settings).get("max_duration")
    return float(longest) if isinstance(longest, int | float) and longest >= 1 else None


def train_block(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The block of the training data."""
    return (settings.get("data") or {}).get("train_ds") or {}


def sources(block: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every source of a data block, including those in groups and in blocks of `multi_config`."""
    listed = block.get("input_cfg")
    for source in listed if isinstance(listed, list) else ():
        if isinstance(source, Mapping):
            yield source
            yield from sources(source)
    if block.get("multi_config"):
        for own in block.values():
            yield from sources(own) if isinstance(own, Mapping) else ()
