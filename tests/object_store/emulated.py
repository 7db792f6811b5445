"""Google Cloud Storage and S3 over a local folder, as fsspec opens them.

As in the stores, an object appears whole or not at all, however slowly it is written.
"""

import os
import shutil
import time
import uuid
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry

from speechlm2_jax.data.storage import filesystems

ROOT = "EMULATED_STORE_FOLDER"
PAUSE_S = "EMULATED_STORE_PAUSE_S"
"""Seconds that each upload of a file takes."""
PACKAGES = Path(__file__).parent / "packages"


class _FolderStore(LocalFileSystem):
    cachable = False

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        root = f"{os.environ[ROOT]}/{cls.protocol}"
        name = str(path).removeprefix(f"{cls.protocol}://").rstrip("/")
        return name if name.startswith(root) else f"{root}/{name}"

    def _put(self, path, blocks, *, creates):
        target = Path(self._strip_protocol(path))
        draft = Path(os.environ[ROOT], "drafts", uuid.uuid4().hex)
        draft.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            for block in blocks:
                file.write(block)
        target.parent.mkdir(parents=True, exist_ok=True)
        if creates:
            os.link(draft, target)
            draft.unlink()
        else:
            draft.replace(target)

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._put(path, [value], creates=mode == "create")

    def get_file(self, rpath, lpath, callback=None, **kwargs):
        shutil.copyfile(self._strip_protocol(rpath), lpath)

    def put_file(self, lpath, rpath, callback=None, **kwargs):
        time.sleep(float(os.environ.get(PAUSE_S, "0")))
        self._put(rpath, [Path(lpath).read_bytes()], creates=False)


class GCSFileSystem(_FolderStore):
    protocol = "gs"


class S3FileSystem(_FolderStore):
    protocol = "s3"


def environment(folder, pause_s=0.0):
    """Variables of processes that shall find the stores in a folder."""
    path = os.pathsep.join([str(PACKAGES), str(Path(__file__).parents[2])])
    return {ROOT: str(folder), PAUSE_S: str(pause_s), "PYTHONPATH": path}


def use_stores(folder, monkeypatch):
    """gs:// and s3:// of this process lie in a folder."""
    monkeypatch.setenv(ROOT, str(folder))
    monkeypatch.setattr(filesystems, "_is_installed", lambda package: True)
    for kind in (GCSFileSystem, S3FileSystem):
        monkeypatch.setitem(_registry, kind.protocol, kind)
