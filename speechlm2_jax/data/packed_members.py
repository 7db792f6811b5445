"""What the buckets of packed rows are planned for, by sums over their conversations."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from speechlm2_jax.data.bucketing import Measures, Members, rows_of
from speechlm2_jax.data.config import LoaderConfig
from speechlm2_jax.data.salm_contents import CLIP_SPREAD


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums, maxima and minima over the conversations of a bucket. Integers are exact."""

    count: int
    positions: int
    clips: int
    clips_squared: int
    clips_by_positions: int
    positions_squared: int
    longest: int | float
    most_clips: int
    most_samples: int
    least_positions: int
    most_positions: int

    @classmethod
    def of(cls, measures: Measures) -> "Sums":
        """Those of conversations, of which there is at least one."""
        positions = measures.positions.astype(np.int64)
        clips = measures.clips.astype(np.int64)
        return cls(
            count=len(measures),
            positions=int(positions.sum()),
            clips=int(clips.sum()),
            clips_squared=int((clips**2).sum()),
            clips_by_positions=int((clips * positions).sum()),
            positions_squared=int((positions**2).sum()),
            longest=measures.length.max().item(),
            most_clips=int(clips.max()),
            most_samples=int(measures.samples.max()),
            least_positions=int(positions.min()),
            most_positions=int(positions.max()),
        )

    def clips_of(self, room: int) -> int:
        """Clips of so many positions: the mean, and CLIP_SPREAD standard deviations.

        The variance is that of a renewal-reward process: conversations until the positions are
        full. Each has clips - (clips per position) * positions more than the mean.
        """
        n, total = self.count, max(self.positions, 1)
        # exact: a difference of large numbers, which is 0 where conversations are alike
        squares = (
            self.clips_squared * total**2
            - 2 * self.clips * total * self.clips_by_positions
            + self.clips**2 * self.positions_squared
        )
        mean = self.clips * total - self.clips * self.positions
        deviation = math.sqrt(max(n * squares - mean**2, 0)) / (n * total)
        spread = math.sqrt(room / max(self.positions / n, 1)) * deviation
        usual = math.ceil(room * (self.clips / total) + CLIP_SPREAD * spread)
        return min(usual, self.clips)


def packed_members(
    sums: Sequence[Sums], config: LoaderConfig, tokens: int, multiple: int
) -> tuple[Members, ...]:
    """What each bucket of rows with so many positions is planned for, from short to long."""
    members: list[Members] = []
    rows = rows_of(tokens, 0, config)
    for number, own in enumerate(sums):
        up_to = sums[: number + 1]
        most_clips = max(one.most_clips for one in up_to)
        variance = max(own.clips_squared / own.count - (own.clips / own.count) ** 2, 0.0)
        members.append(
            Members(
                count=own.count,
                longest=own.longest,
                filled=own.positions,
                clips_mean=own.clips / own.count,
                clips_std=variance**0.5 if own.most_clips * own.count != own.clips else 0.0,
                most_clips=own.most_clips,
                most_clips_up_to=most_clips,
                positions_up_to=tokens,
                samples_up_to=max(one.most_samples for one in up_to),
                rows=rows,
                multiple=multiple,
                packed_clips=max(own.clips_of(rows * tokens), most_clips, 1),
                least_positions=min(one.least_positions for one in up_to),
                most_positions=max(one.most_positions for one in up_to),
            )
        )
    return tuple(members)
