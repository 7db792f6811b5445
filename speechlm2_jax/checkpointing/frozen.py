"""Reads the frozen parameters of a run, or rebuilds them if their store is damaged."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.checkpointing.checksums import Checksums, DamagedError, read_checksums
from speechlm2_jax.checkpointing.contents import contents_of
from speechlm2_jax.checkpointing.folders import CONTENTS, FROZEN, UNKNOWN

log = logging.getLogger(__name__)

Verify = Callable[[Path], Checksums | None]
Arrays = Mapping[str, Any]
_REMEDY = "copy that folder from a backup, or start a new run in another directory"


class FrozenStoreError(DamagedError):
    """The frozen parameters, which all steps of a run share, are damaged and cannot be rebuilt."""


@dataclass(frozen=True, kw_only=True)
class FrozenStore:
    """The folder of a run's frozen parameters, as one of its steps sees it."""

    folder: Path
    promised: str | None
    """The step's note of their contents; None for a step of an older version, or of no frozen."""

    @staticmethod
    def beside(step: Path, checksums: Checksums | None) -> "FrozenStore":
        """The store that a step goes with."""
        notes = {} if checksums is None else checksums.notes
        return FrozenStore(folder=step.parent / FROZEN, promised=notes.get(FROZEN))

    @property
    def is_expected(self) -> bool:
        """Whether the run has frozen parameters."""
        return self.promised is not None or self.folder.is_dir()

    def read(
        self,
        verify: Verify,
        read: Callable[[Path], Arrays],
        rebuild: Callable[[], Iterable[Arrays]] | None,
    ) -> tuple[Arrays, bool]:
        """The frozen parameters, and whether they were rebuilt.

        `rebuild` loads them from their pretrained source, in each form that they may have been
        stored in; the one whose checksum was noted when they were written is used. Raises
        FrozenStoreError if they are damaged and there is no such source.
        """
        try:
            self._verify(verify)
        except DamagedError as error:
            return self._rebuilt(str(error), rebuild), True
        return read(self.folder), False

    def _verify(self, verify: Verify) -> None:
        checksums = verify(self.folder)
        if self.promised is None:
            return
        if checksums is None:
            raise DamagedError(f"{self.folder} has lost its checksums")
        if self.promised not in (UNKNOWN, checksums.notes.get(CONTENTS)):
            raise DamagedError(f"{self.folder} is not the one that this step goes with")

    def _rebuilt(self, damage: str, rebuild: Callable[[], Iterable[Arrays]] | None) -> Arrays:
        wanted = self.promised or self._own_note()
        if rebuild is None or wanted in (None, UNKNOWN):
            raise FrozenStoreError(f"{damage}; these frozen parameters have no source; {_REMEDY}")
        try:
            for arrays in rebuild():
                if contents_of(arrays) == wanted:
                    log.warning("%s; frozen parameters come from their pretrained source", damage)
                    return arrays
        except Exception as error:  # a missing source can raise anything
            why = " ".join(str(error).split())
            raise FrozenStoreError(
                f"{damage}; their pretrained source cannot be read ({why}); {_REMEDY}"
            ) from error
        raise FrozenStoreError(f"{damage}; their pretrained source has other values now; {_REMEDY}")

    def _own_note(self) -> str | None:
        try:
            checksums = read_checksums(self.folder)
        except DamagedError:
            return None
        return None if checksums is None else checksums.notes.get(CONTENTS)
