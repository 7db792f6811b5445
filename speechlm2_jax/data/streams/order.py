"""In which order a group reads shards: a pure function of the seeds, the group and its turn."""

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_PURPOSE_SOURCE, _PURPOSE_PLACE = 4001, 4002
_BLOCK = 4096


class Unit(NamedTuple):
    """What one group reads of one shard in one epoch."""

    epoch: int
    shard: int
    part: int
    """Of the members: every `parts`-th one."""


@dataclass(frozen=True, kw_only=True)
class ShardOrder:
    """Endless turns over the shards of one pool, dealt out to groups.

    The shards of all epochs form one endless row, of which each group takes every `groups`-th
    one. So in each epoch every shard is read once, and no group falls behind. Where there are fewer
    shards than groups, each is read by several of them, which take turns with its members.
    """

    shards: int
    groups: int
    seed: int
    shuffle: bool
    """Whether the order is drawn anew for each epoch, as Lhotse draws it; else as listed."""

    @property
    def parts(self) -> int:
        """How many groups share a shard."""
        return max(-(-self.groups // self.shards), 1)

    def unit(self, turn: int) -> Unit:
        """What is read in a turn: group g has the turns g, g + groups, g + 2 groups, ..."""
        epoch, place = divmod(turn, self.shards * self.parts)
        shard, part = divmod(place, self.parts)
        return Unit(epoch, _order(self.shards, self.seed + epoch, self.shuffle)[shard], part)


@functools.lru_cache(maxsize=64)
def _order(shards: int, seed: int, shuffle: bool) -> Sequence[int]:
    order = list(range(shards))
    if shuffle:
        random.Random(seed).shuffle(order)  # noqa: S311
    return order


class Draws:
    """Random numbers for the examples of a group, by their number.

    Args:
        seed: of the data set.
        group: whose.
        purpose: tells several draws of one example apart.
    """

    def __init__(self, seed: int, group: int, purpose: int) -> None:
        self._key = (seed, purpose, group)
        self._block, self._values = -1, np.zeros(0)

    def __call__(self, number: int) -> float:
        """A number from 0 to 1."""
        block, place = divmod(number, _BLOCK)
        if block != self._block:
            self._block = block
            self._values = np.random.default_rng([*self._key, block]).random(_BLOCK)
        return float(self._values[place])


def source_draws(seed: int, group: int) -> Draws:
    """Those of the pool that an example is read from."""
    return Draws(seed, group, _PURPOSE_SOURCE)


def place_draws(seed: int, group: int) -> Draws:
    """Those of how far an example is moved back by the shuffle buffer."""
    return Draws(seed, group, _PURPOSE_PLACE)
