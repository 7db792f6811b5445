"""Finds pretrained components: local files and directories, or repositories on the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax.bundled import config_roots, with_bundled
from speechlm2_jax.conversion import readers
from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.nemo import NemoArchive
from speechlm2_jax.data.tokenizer import Tokenizer
from speechlm2_jax.object_store.copies import fetch_run
from speechlm2_jax.object_store.folders import is_address
from speechlm2_jax.pretrained import hub_files
from speechlm2_jax.pretrained.near_paths import check_missing, nearest_path
from speechlm2_jax.settings import SettingsError

LLM_BACKBONE = "llm_backbone"
"""Folder of a saved model that holds its LLM's config.json, as NeMo 3 writes it."""
ASR = "asr"
"""Folder of a saved SALMWithAsrDecoder that holds its ASR model's config and tokenizer."""
AUDIO_CODEC = "audio_codec"
"""Folder of a saved duplex model that holds its codec's config."""
GENERATION_CONFIG = "generation_config.json"
"""An LLM's defaults of generation, beside its config.json."""
LLM_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "README.md")


@dataclass(frozen=True, kw_only=True)
class Location:
    """Looks names up: in the working directory, in `near`, among bundled files, on the hub."""

    near: tuple[Path, ...] = ()

    def local(self, name: str) -> Path | None:
        """The existing path that `name` means, or None."""
        path = Path(name).expanduser()
        candidates = [path]
        if not path.is_absolute():
            candidates += [*(n / path for n in self.near), Path(with_bundled(name))]
        return next((c.absolute() for c in candidates if c.exists()), None)

    def find(self, name: str, *, key: str, patterns: tuple[str, ...] = LLM_FILES) -> Path:
        """The path that `name` means, downloaded from the hub if it is not a local one.

        A name of the hub may pin a revision: OWNER/NAME@REVISION.
        Of an address of an object store, it is a local copy of the run there: its best checkpoint,
        else the last. Raises SettingsError naming `key` if it is found nowhere.
        """
        if is_address(name):
            try:
                return fetch_run(name)
            except SettingsError as error:
                raise SettingsError(f"{key}: {error}") from error
        found = self.local(name)
        if found is not None:
            return found
        check_missing(name, key=key)
        near = nearest_path(name)
        hint = f"did you mean {near!r}?" if near else ""
        return hub_files.download(name, key=key, patterns=patterns, hint=hint)

    def find_model(self, name: str, *, key: str) -> Path:
        """The path of a whole model: a local one, or of the hub its `.nemo` file or its folder."""
        found = self.local(name)
        if found is not None:
            return found
        if is_address(name):
            return self.find(name, key=key)
        folder = self.find(name, key=key, patterns=("*.nemo", "config.json"))
        archives = sorted(folder.glob("*.nemo"))
        return archives[0] if len(archives) == 1 else self.find(name, key=key)

    def find_nemo(self, name: str, *, key: str) -> Path:
        """The `.nemo` file that `name` means: a path, or the one file of a hub repository."""
        path = self.find(name, key=key, patterns=("*.nemo",))
        if path.is_file():
            return path
        archives = sorted(path.glob("*.nemo"))
        if len(archives) != 1:
            raise SettingsError(f"{key}: {name!r} holds {len(archives)} .nemo files, expected one")
        return archives[0]


def config_folders() -> tuple[Path, ...]:
    """Folders of settings files, which name components relative to them."""
    return tuple(folder for root in config_roots() for folder in (root, root / "recipes"))


def read_config_json(path: Path, *, key: str) -> dict[str, Any]:
    """Reads a JSON object. Raises SettingsError naming `key` if there is none."""
    if path.parent.is_file():
        raise SettingsError(
            f"{key}: {path.parent} is a file; name the directory that holds it with its {path.name}"
        )
    if not path.is_file():
        what = readers.folder_problem(path.parent) if path.parent.is_dir() else ""
        raise SettingsError(f"{key}: {path} is missing" + (f": {what}" if what else ""))
    try:
        return readers.read_json(path)
    except ConversionError as error:
        raise SettingsError(f"{key}: {error}") from error


def nemo_tokenizer(archive: NemoArchive) -> Tokenizer:
    """The SentencePiece tokenizer in an archive. Raises SettingsError if it has none."""
    reference = (archive.config.get("tokenizer") or {}).get("model_path")
    if not isinstance(reference, str):
        raise SettingsError(
            f"{archive.path}: its config names no SentencePiece tokenizer; for a model with "
            "characters or word pieces use slm.models.ASRModel"
        )
    return Tokenizer.from_sentencepiece(archive.artifact(reference))
