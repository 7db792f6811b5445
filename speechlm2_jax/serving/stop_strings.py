"""Stop strings in a text that grows."""

from collections.abc import Sequence


class StoppedText:
    """A text up to the first of some stop strings, which is left out of it.

    The end of the text is held back while it may be the beginning of a stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._all = ""
        self.text, self.is_stopped = "", False
        """What was given out so far, and whether a stop string was found."""

    def add(self, delta: str, is_last: bool) -> str:
        """Takes new text, and returns what of it can be given out."""
        if self.is_stopped:
            return ""
        self._all += delta
        found = [place for s in self._strings if (place := self._all.find(s)) >= 0]
        if found:
            self.is_stopped = True
            end = min(found)
        else:
            end = len(self._all) if is_last else len(self._all) - self._held_back()
        given, self.text = self.text, self._all[:end]
        return self.text[len(given) :]

    def _held_back(self) -> int:
        """The length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._strings), default=1) - 1
        for count in range(min(longest, len(self._all)), 0, -1):
            if any(s.startswith(self._all[-count:]) for s in self._strings):
                return count
        return 0
