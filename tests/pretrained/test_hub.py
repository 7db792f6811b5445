"""push_to_hub uploads what save_pretrained writes; every failure is one line with what to do."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

import speechlm2_jax as slm
from speechlm2_jax.pretrained import hub
from speechlm2_jax.settings import SettingsError

DATA = Path(__file__).parents[1] / "data"
COMMIT = "https://hub.example/someone/model/commit/1"


class TransportError(Exception):
    """What HTTP packages name their errors of the network."""


class FakeHub:
    """Stands for huggingface_hub.HfApi: keeps what was asked of it."""

    def __init__(self):
        self.calls: list[tuple[str, dict]] = []
        self.files: dict[str, bytes] = {}
        self.failures: dict[str, Exception] = {}

    def opened(self, token: str) -> "FakeHub":
        self.token = token
        return self

    def create_repo(self, repo_id: str, **options):
        self._note("create_repo", repo_id=repo_id, **options)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self, *, folder_path: str, **options):
        self._note("upload_folder", **options)
        root = Path(folder_path)
        files = [path for path in root.rglob("*") if path.is_file()]
        self.files = {path.relative_to(root).as_posix(): path.read_bytes() for path in files}
        return SimpleNamespace(commit_url=COMMIT)

    def _note(self, name: str, **options):
        self.calls.append((name, options))
        if name in self.failures:
            raise self.failures[name]


@pytest.fixture
def api(monkeypatch):
    fake = FakeHub()
    # a class still: transformers may be imported meanwhile, and has HfApi in annotations
    stand_in = type("HfApi", (), {"__new__": lambda cls, token: fake.opened(token)})
    monkeypatch.setattr(huggingface_hub, "HfApi", stand_in)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "logged in")
    return fake


class HttpError(OSError):
    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Client Error\nfor url")
        self.response = SimpleNamespace(status_code=status)


def test_a_model_is_uploaded_as_it_would_be_saved(api, tmp_path, monkeypatch):
    monkeypatch.chdir(DATA / "salm")
    model = slm.models.SALM.from_pretrained("qwen3_lora_hf")
    address = model.push_to_hub(
        "someone/model", private=True, revision="v1", create_pr=True, merge_lora=True
    )
    assert address == COMMIT and api.token == "logged in"
    (created, first), (uploaded, second) = api.calls
    assert (created, uploaded) == ("create_repo", "upload_folder")
    assert first == {
        "repo_id": "someone/model",
        "private": True,
        "repo_type": "model",
        "exist_ok": True,
    }
    assert second["repo_id"] == "someone/model" and second["revision"] == "v1"
    assert second["create_pr"] and second["commit_message"] == "Upload model"
    model.save_pretrained(tmp_path, merge_lora=True)
    saved = {p.relative_to(tmp_path).as_posix(): p for p in tmp_path.rglob("*") if p.is_file()}
    assert saved.keys() == api.files.keys()
    for name, path in saved.items():
        assert name == "README.md" or path.read_bytes() == api.files[name]
    assert 'from_pretrained("someone/model")' in api.files["README.md"].decode()


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ("create_repo", HttpError(401), "token is not valid"),
        ("create_repo", HttpError(403), "write access"),
        ("upload_folder", HttpError(404), "no such account"),
        ("create_repo", ConnectionError("no route"), "cannot be reached"),
        ("upload_folder", type("ConnectError", (TransportError,), {})("x"), "cannot be reached"),
        ("create_repo", OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        ("create_repo", HFValidationError("x"), "OWNER/NAME"),
        ("upload_folder", RuntimeError("odd\nthing"), "RuntimeError: odd thing"),
    ],
)
def test_a_failure_is_one_line_that_names_the_repository(api, call, error, match):
    api.failures[call] = error
    with pytest.raises(SettingsError, match=match) as raised:
        hub.upload(hub.Upload(repo_id="a/b"), lambda folder: None)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("push_to_hub: 'a/b'")


def test_nothing_is_written_before_the_hub_accepts(api):
    api.failures["create_repo"] = HttpError(401)

    def write(folder: Path):
        raise AssertionError("written")

    with pytest.raises(hub.HubError):
        hub.upload(hub.Upload(repo_id="a/b"), write)


def test_without_a_token_nothing_is_asked_of_the_hub(api, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(hub.HubError, match="hf auth login"):
        hub.upload(hub.Upload(repo_id="a/b"), lambda folder: None)
    assert api.calls == []
    assert hub.upload(hub.Upload(repo_id="a/b", token="own"), lambda folder: None) == COMMIT
    assert api.token == "own"


def test_the_real_client_without_a_network_gives_one_line(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(hub.HubError, match="push_to_hub: 'a/b'.*(HF_HUB_OFFLINE|reached)"):
        hub.upload(hub.Upload(repo_id="a/b", token="hf_none"), lambda folder: None)
