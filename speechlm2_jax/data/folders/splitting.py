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
    split alike. The smaller sets choose first: each takes the groups that bring it nearer to its
    share of `seconds`, and the smallest group if every one is too large. The largest set gets the
    others. Raises SettingsError if there are fewer groups than sets.
    """
    if len(groups) < len(shares):
        raise SettingsError(
            f"--split: {len(groups)} groups (speakers or files) cannot fill {len(shares)} sets; "
            "name fewer sets (--split train=1), or split --by file"
        )
    total = sum(seconds.values())
    left = sorted(groups, key=lambda key: xxhash.xxh3_64_intdigest(f"{seed} {key}".encode()))
    parts: dict[str, list[Item]] = {name: [] for name in shares}
    ascending = sorted(shares, key=lambda name: shares[name])
    for others, name in zip(range(len(shares) - 1, -1, -1), ascending, strict=True):
        most = len(left) - others
        chosen = _chosen(left, seconds, shares[name] * total)[:most] if others else left
        parts[name] = [item for key in chosen for item in groups[key]]
        taken = set(chosen)
        left = [key for key in left if key not in taken]
    return parts


def _chosen(groups: Sequence[str], seconds: Mapping[str, float], wanted_s: float) -> list[str]:
    """The groups, in order, that come nearest to so many seconds; at least one."""
    chosen, lack_s = list[str](), wanted_s
    for key in groups:
        if seconds[key] < 2 * lack_s:
            chosen.append(key)
            lack_s -= seconds[key]
    return chosen or [min(groups, key=lambda key: seconds[key])]


def far_off(seconds: Mapping[str, float], shares: Mapping[str, float]) -> dict[str, float]:
    """Set -> its share of the seconds, of sets with over twice or under half of what they should.

    `seconds` are those that each set got.
    """
    total = sum(seconds.values()) or 1.0
    got = {name: seconds[name] / total for name in shares}
    return {name: own for name, own in got.items() if not 0.5 <= own / shares[name] <= 2}
