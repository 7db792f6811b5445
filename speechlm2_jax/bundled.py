"""Where bundled configs, components, corpus and pages are: in the clone or the installed package.

Names such as `corpus/train.jsonl` and `configs/parts/tiny_encoder.nemo` mean a file of the working
folder first, and the bundled one if there is none.
"""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "bundled_files"
"""Where a wheel puts configs/, corpus/ and docs/."""
ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
"""The folder of configs/, corpus/ and docs/."""
CONFIGS = ROOT / "configs"
_FOLDERS = ("corpus/", "configs/")


def with_bundled(path: str) -> str:
    """`path`; or the bundled file or folder of that name below _FOLDERS if there is none here."""
    if not path.startswith(_FOLDERS) or os.path.exists(path):
        return path
    bundled = ROOT / path
    return str(bundled) if bundled.exists() else path


def page(name: str) -> str:
    """Where a page of docs/ is, for messages: `docs/NAME` in the clone, else its whole path."""
    here = f"docs/{name}"
    return here if os.path.exists(here) else str(ROOT / here)


def config_roots() -> tuple[Path, Path]:
    """Folders of settings files: that of the working folder, then the bundled one."""
    return Path("configs"), CONFIGS
