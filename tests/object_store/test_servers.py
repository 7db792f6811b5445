"""The real libraries, s3fs and gcsfs, against servers that emulate the services.

They need packages that this project does not, `SERVICES`.
"""

import socket
import threading

import fsspec.config
import pytest

from speechlm2_jax.object_store.copies import fetch_run
from speechlm2_jax.object_store.objects import ObjectStore
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.training.run.store_lock import StoreLock
from tests.object_store.tiny_run import Run, files

SERVICES = 's3fs "moto[s3]" flask flask-cors gcsfs gcp-storage-emulator'
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # warnings of the servers


def _needed(name: str):
    """A package of the emulated services; without it the test tells how to get all of them."""
    return pytest.importorskip(name, reason=f"no {name}: pip install {SERVICES}")


@pytest.fixture(params=["s3", "gs"])
def address(request, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEECHLM2_JAX_RUN_CACHE", str(tmp_path / "cache"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    if request.param == "s3":
        s3fs = _needed("s3fs")
        server = _needed("moto.server").ThreadedMotoServer("127.0.0.1", port)
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL")
        for name, value in zip(names, ("a", "b", url), strict=True):
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server.start()
        s3fs.S3FileSystem().mkdir("bucket")
    else:
        monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks another service
        _needed("gcsfs")  # reads that variable
        servers = _needed("gcp_storage_emulator.server")
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", url)
        monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon", "endpoint_url": url})
        server = servers.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
        server.start()
    yield f"{request.param}://bucket/runs/one"
    server.stop()


def test_a_run_is_uploaded_and_comes_back(address):
    run = Run(address)
    run.step("frozen"), run.step(3), run.step(6)
    run.write("metrics.jsonl", '{"step": 6}\n'), run.write("model/config.json", "{}")
    run.write("large.bin", "0" * (66 << 20))  # several parts
    run.mirror().push()
    assert run.committed() == ["frozen", "3", "6"]
    before = files(run.folder)
    run.lose()
    again = Run(address)
    assert sorted(again.commits) == ["3", "6", "frozen"] and files(again.folder) == before
    again.delete(3), again.mirror().push()
    assert again.committed() == ["frozen", "6"]
    assert {name.split("/")[1] for name in run.store.sizes("checkpoints")} == {"frozen", "6"}
    assert (fetch_run(f"{address}/checkpoints/6") / "params/d/1").read_text() == "weights of 6"


def test_one_process_gets_the_lock(address):
    store, winners = ObjectStore(address), []
    assert store.sizes() == {} and store.read("a") is None
    lock = StoreLock(store)
    with pytest.raises(SettingsError, match="is in use by another training"):
        StoreLock(store)
    lock.release()
    assert store.sizes() == {}

    def create(index):
        if store.create("race", str(index).encode()):
            winners.append(index)

    threads = [threading.Thread(target=create, args=(index,)) for index in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert [str(index).encode() for index in winners] == [store.read("race")]
