"""A run directory at an address of an emulated store, and what surrounds it."""

import shutil

import fsspec
import pytest

from speechlm2_jax.checkpointing import write_checksums
from speechlm2_jax.object_store import mirror as mirrors
from speechlm2_jax.object_store import objects
from speechlm2_jax.object_store.downloads import prepare
from speechlm2_jax.object_store.folders import CACHE_VARIABLE, working_folder
from speechlm2_jax.object_store.mirror import Mirror
from speechlm2_jax.object_store.objects import ObjectStore
from tests.object_store.emulated import use_stores

ADDRESSES = ("memory://bucket/runs/one", "gs://bucket/runs/one", "s3://bucket/runs/one")


@pytest.fixture
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(objects, "PAUSES_S", ())
    monkeypatch.setattr(mirrors, "LOOK_S", 0.02)
    monkeypatch.setattr(mirrors, "FIRST_RETRY_S", 0.02)
    monkeypatch.setattr(mirrors, "_DELETED_WITHIN_S", 0.2)
    use_stores(tmp_path / "stores", monkeypatch)
    yield
    fsspec.filesystem("memory").store.clear()


class Run:
    """A run directory at an address, whose checkpoints are a few bytes."""

    def __init__(self, address=ADDRESSES[0]):
        self.store, self.folder = ObjectStore(address), working_folder(address)
        self.commits = prepare(self.store, self.folder)

    def step(self, step, text="weights"):
        final = self.folder / "checkpoints" / str(step)
        folder = self.folder / "checkpoints" / f".{step}"
        for part in ("params/d", "opt", "progress"):
            (folder / part).mkdir(parents=True)
        (folder / "params/d/1").write_text(f"{text} of {step}")
        (folder / "opt/2").write_text("")
        write_checksums(folder, {})
        return folder.rename(final)

    def delete(self, step):
        shutil.rmtree(self.folder / "checkpoints" / str(step))

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mirror(self):
        return Mirror(self.store, self.folder, self.commits)

    def committed(self):
        names = (name.partition("/")[2] for name in self.store.sizes("committed"))
        return sorted(names, key=lambda name: (name.isdigit(), len(name), name))

    def lose(self):
        shutil.rmtree(self.folder)


def files(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
