"""Writes checksums into a checkpoint before it is renamed to its final name."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path

from orbax.checkpoint.path import atomicity, atomicity_types

from speechlm2_jax.checkpointing.checksums import write_checksums

Notes = Callable[[], Mapping[str, str]]


def with_checksums(notes: Notes) -> type[atomicity.AtomicRenameTemporaryPath]:
    """Orbax's way to write a folder and then rename it, with checksums before that rename.

    Orbax calls `finalize` on the first process when every process has written its files. `notes`
    is asked then.
    """

    class WithChecksums(atomicity.AtomicRenameTemporaryPath):
        async def finalize(self) -> None:
            final = self.get_final()
            if atomicity_types.TMP_DIR_SUFFIX in str(final.parent):
                await super().finalize()  # an item inside a step; the step has the checksums
                return
            # Orbax's own finalize still writes files: it ends under another temporary name
            whole = final.parent / f"{final.name}{atomicity_types.TMP_DIR_SUFFIX}-whole"
            self._final_path = whole
            try:
                await super().finalize()
            finally:
                self._final_path = final
            await asyncio.to_thread(lambda: write_checksums(Path(whole), notes()))
            await asyncio.to_thread(Path(whole).rename, Path(final))

    return WithChecksums
