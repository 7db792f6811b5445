"""What the log tells of a planned data set: shapes, what is left out, and shares."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from speechlm2_jax.data.outliers import FAR
from speechlm2_jax.data.sources import Source

IDS_IN_LOG = 10
"""Conversations that the log names for each cause of leaving out."""
_log = logging.getLogger(__name__)


def report(
    where: str, table: str, dropped: Mapping[str, int], names: Mapping[str, Sequence[str]]
) -> None:
    """Logs the table of shapes, and the conversations left out by each cause."""
    _log.info("%s: batch shapes per group\n%s", where, table)
    for cause, count in dropped.items():
        hint = "; keep_outliers: true keeps them" if cause.endswith(FAR) else ""
        ids = _listed(names[cause])
        _log.warning("%s: %d left out by %s: %s%s", where, count, cause, ids, hint)


def warn_of_kept(where: str, rows: Sequence[str]) -> None:
    """Warns of outliers that stay in the data set."""
    _log.warning(
        "%s: outliers in length, kept by keep_outliers, which enlarge every shape: %s",
        where,
        _listed(rows),
    )


def warn_of_shares(where: str, sources: Sequence[Source[Any]], sizes: Sequence[int]) -> None:
    """Warns of several sources without weights, with the share that each has of an epoch.

    Of sources with weights it warns of those that have no conversation left.
    """
    if len(sizes) < 2:
        return
    if sources[0].share is not None:
        empty = [s for s, size in zip(sources, sizes, strict=True) if s.share and not size]
        for source in empty:
            _log.warning(
                "%s.input_cfg: no conversation of %s is left; the others have its share of %.1f %%",
                *(where, source.name, 100 * (source.share or 0)),
            )
        return
    named = zip((source.name for source in sources), sizes, strict=True)
    shares = [f"{name} {size / sum(sizes):.1%}" for name, size in named]
    _log.warning(
        "%s.input_cfg: %d sources without weights have the shares of their conversations: %s; "
        "NeMo gives them equal shares: for these set `weight: 1` on each entry",
        where,
        len(sizes),
        _listed(shares),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:IDS_IN_LOG]) + (", ..." if len(names) > IDS_IN_LOG else "")
