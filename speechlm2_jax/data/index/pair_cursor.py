"""Lines of one text beside those of another: the pairs of `txt_pair`."""

from collections.abc import Iterator

from speechlm2_jax.data.index.rows import lines_of
from speechlm2_jax.data.index.texts import Text, count_lines, lines_between, whole_lines


class PairCursor:
    """Finds the line of one text that has the number of a line of another.

    It goes forward; what is asked for before its place is counted from the start again.

    Args:
        source: the text whose places are asked for.
        target: the text whose lines are found.
    """

    def __init__(self, source: Text, target: Text) -> None:
        self._source, self._target = source, target
        self._at = self._found = 0
        self.lines = 0
        """Lines before the place."""

    def lines_from(self, place: int) -> Iterator[tuple[int, bytes]]:
        """The lines of the target from that on which has the number of the source's at a place.

        Each with its offset.
        """
        if place < self._at:
            self._at = self._found = self.lines = 0
        count = lines_between(self._source, self._at, place)
        self._found = _place_after(self._target, self._found, count)
        self._at, self.lines = place, self.lines + count
        return (
            line
            for start, data in whole_lines(self._target, self._found)
            for line in lines_of(data, start)
        )


def _place_after(text: Text, place: int, lines: int) -> int:
    """Where the line begins that comes so many lines after that at a place."""
    for start, data in whole_lines(text, place):
        if not lines:
            break
        if (count := count_lines(data)) > lines:
            return start + sum(map(len, data.splitlines(keepends=True)[:lines]))
        lines, place = lines - count, start + len(data)
    return place
