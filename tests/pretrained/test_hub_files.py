"""Models of the hub: a revision may be pinned, the cache serves offline, failures are one line."""

from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

import speechlm2_jax as slm
from speechlm2_jax.pretrained import hub_files
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.transcription.opening import Options, open_model

PARTS = Path(__file__).parents[2] / "configs" / "parts"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with an ASR model (main, v1) and a directory of an LLM (main)."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.chdir(tmp_path)
    for name, revisions in (("asr", ("main", "v1")), ("llm", ("main",))):
        own = folder / f"models--someone--{name}"
        for revision in revisions:
            snapshot = own / "snapshots" / COMMITS[revision]
            snapshot.mkdir(parents=True)
            (own / "refs").mkdir(exist_ok=True)
            (own / "refs" / revision).write_text(COMMITS[revision])
            if name == "asr":
                (snapshot / f"asr-{revision}.nemo").symlink_to(PARTS / "tiny_encoder.nemo")
            else:
                for file in (PARTS / "tiny_llm").iterdir():
                    (snapshot / file.name).symlink_to(file)
    return folder


def test_a_revision_is_pinned_with_an_at_sign(cache):
    find = Location().find_model
    assert find("someone/asr", key="--model").name == "asr-main.nemo"
    assert find("someone/asr@v1", key="--model").name == "asr-v1.nemo"
    assert find(f"someone/asr@{COMMITS['v1']}", key="--model").name == "asr-v1.nemo"
    assert (find("someone/llm", key="--model") / "config.json").is_file()
    model = slm.models.ASRModel.from_pretrained("someone/asr@v1")
    assert model.sampling_rate == 16_000


def test_transcription_opens_what_is_in_the_cache(cache):
    assert open_model("someone/asr", Options()).sampling_rate == 16_000
    with pytest.raises(SettingsError, match="--model: .* is a Hugging Face LLM .* needs a SALM or"):
        open_model("someone/llm", Options())
    with pytest.raises(SettingsError, match="--prompt: leave out; someone/asr is an ASR model"):
        open_model("someone/asr", Options(prompt="Say:"))


def test_offline_a_model_that_is_not_cached_is_one_line(cache):
    with pytest.raises(SettingsError) as found:
        Location().find_model("someone/other", key="--model")
    assert str(found.value) == (
        "--model: 'someone/other' is not a local path, and it is not in the hub's cache, which is "
        "all that HF_HUB_OFFLINE=1 allows; unset it, or give a local path"
    )
    with pytest.raises(SettingsError, match="not in the hub's cache at revision 'v9'"):
        Location().find_model("someone/asr@v9", key="--model")


def failing(monkeypatch, kind: type[Exception], status: int) -> None:
    request = httpx.Request("GET", "https://hub.example")
    response = httpx.Response(status, request=request)

    def download(*args, **options):
        raise kind("Client Error.\n\nlong text", response=response)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)


@pytest.mark.parametrize(
    ("kind", "status", "wanted"),
    [
        (errors.GatedRepoError, 403, "is gated: accept its conditions at https://huggingface.co/"),
        (errors.RepositoryNotFoundError, 404, "no such repository on the hub; if it is private,"),
        (errors.RevisionNotFoundError, 404, "has no revision 'v1'; its branches and tags are at"),
        (errors.HfHubHTTPError, 500, r"failed \(HfHubHTTPError: .*\); give a local path"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, kind, status, wanted):
    failing(monkeypatch, kind, status)
    with pytest.raises(SettingsError, match=wanted) as found:
        hub_files.download("someone/asr@v1", key="--model", patterns=["*"])
    assert str(found.value).count("\n") == 0 and "'someone/asr'" in str(found.value)


def test_a_misspelt_path_is_named_first(cache):
    Path("runs/salm").mkdir(parents=True)
    with pytest.raises(SettingsError, match="did you mean 'runs/salm'"):
        Location().find("runs/slam", key="--model")
