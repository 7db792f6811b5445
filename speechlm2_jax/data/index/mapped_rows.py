"""What the indexes of manifests and of tars have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechlm2_jax.data.manifest_options import ManifestOptions


@dataclass(frozen=True, kw_only=True)
class MappedRows(ABC):
    """Rows as columns in mapped memory."""

    columns: Mapping[str, np.ndarray]
    """Those of `row_columns`, or of `packed_columns`."""
    identity: str
    """Changes with the rows, and with what their token counts depend on."""
    folders: tuple[Path, ...]
    """Where the index and what belongs to it may be."""

    @property
    @abstractmethod
    def options(self) -> ManifestOptions:
        """How rows become conversations."""
        ...

    def __len__(self) -> int:
        return len(self.columns["flags"])

    @property
    def token_equivalent_s(self) -> float | None:
        """Seconds of audio that count as one token."""
        return self.options.token_equivalent_duration_s

    @property
    def locator_tags(self) -> frozenset[str]:
        """The token that stands for a recording."""
        return frozenset({self.options.locator_tag})
