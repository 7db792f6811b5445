"""Splits recordings into training, validation and test sets, always in the same way."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import xxhash

from speechlm2_jax.settings import SettingsError

Item = TypeVar("Item")
LEFT_OUT_SET = "left_out"
"""A name that no set may have: its file lists what no set has."""


def parse_shares(text: str) -> dict[str, float]:
    """Reads `train=0.9,validation=0.05,test=0.05`.

    Raises SettingsError unless each share is above 0 and they add up to 1.
    """
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number)
        except ValueError:
            share = 0.0
        if name == LEFT_OUT_SET:
            raise SettingsError(
                f"--split {text}: {name}.jsonl lists what is left out; choose another"
            )
        if not (name.isidentifier() and equals and 0 < share <= 1) or name in shares:
            raise SettingsError(f"--split {text}: write NAME=SHARE,... as train=0.9,test=0.1")
        shares[name] = share
    if abs(sum(shares.values()) - 1) > 1e-6:
        raise SettingsError(f"--split {text}: the shares add up to {sum(shares.values()):g}, not 1")
    return shares


def split(
    groups: Mapping[str, Sequence[Item]],
    seconds: Mapping[str, float],
    shares: Mapping[str, float],
    *,
    seed: int,
) -> dict[str, list[Item]]:
    """Gives whole groups (speakers, or single files) to sets, so that no group is in two.

    The groups come in the order of a hash of their names and `seed`, so the same folder is always
    split alike. Each goes to the set that lacks most of its share of `seconds`; every set gets one
    before any gets a second. Raises SettingsError if there are fewer groups than sets.
    """
    if len(groups) < len(shares):
        raise SettingsError(
            f"--split: {len(groups)} groups (speakers or files) cannot fill {len(shares)} sets; "
            "name fewer sets (--split train=1), or split --by file"
        )
    total = sum(seconds.values()) or 1.0
    given = dict.fromkeys(shares, 0.0)
    parts: dict[str, list[Item]] = {name: [] for name in shares}
    for key in sorted(groups, key=lambda key: xxhash.xxh3_64_intdigest(f"{seed} {key}".encode())):
        empty = [name for name in shares if not parts[name]]
        target = max(empty or shares, key=lambda name: shares[name] - given[name] / total)
        parts[target] += groups[key]
        given[target] += seconds[key]
    return parts
