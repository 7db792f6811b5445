"""Licences of base models: what their own model cards name, and a table of well-known ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechlm2_jax.conversion.errors import ConversionError
from speechlm2_jax.conversion.readers.yaml_text import MAX_BYTES, read_yaml

CARD = "README.md"
FENCE = "---"
KEPT = ("license", "license_name", "license_link", "language", "datasets", "model-index")
"""Keys of a model card that are facts about the weights, whatever format they are written in."""
KNOWN: Mapping[str, str] = {
    "Qwen/Qwen3-": "apache-2.0",
    "Qwen/Qwen2.5-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-1.5B": "apache-2.0",
    "Qwen/Qwen2.5-7B": "apache-2.0",
    "TinyLlama/TinyLlama": "apache-2.0",
    "HuggingFaceTB/SmolLM": "apache-2.0",
    "meta-llama/Llama-3.2-": "llama3.2",
    "meta-llama/Llama-3.1-": "llama3.1",
    "google/gemma-": "gemma",
    "microsoft/Phi-4-mini": "mit",
    "ibm-granite/granite-3": "apache-2.0",
    "nvidia/canary-1b-flash": "cc-by-4.0",
    "nvidia/canary-qwen-2.5b": "cc-by-4.0",
    "nvidia/parakeet-tdt-0.6b": "cc-by-4.0",
}
"""Beginning of a name on the hub -> licence by the hub's identifier."""


def front_matter(folder: Path | None) -> dict[str, Any]:
    """The YAML at the head of a folder's model card; {} if it has none that can be read."""
    if folder is None or not (folder / CARD).is_file():
        return {}
    with (folder / CARD).open("rb") as file:
        head, _, rest = file.read(MAX_BYTES).partition(b"\n")
    block, fence, _ = rest.partition(f"\n{FENCE}".encode())
    if head.strip() != FENCE.encode() or not fence:
        return {}
    try:
        return read_yaml(block, str(folder / CARD))
    except ConversionError:  # a card is no part of the model
        return {}


def kept_facts(folder: Path | None) -> dict[str, Any]:
    """What a folder's model card tells about its weights."""
    found = front_matter(folder)
    return {key: found[key] for key in KEPT if found.get(key) is not None}


def licence_of(name: str, folder: Path | None = None) -> str | None:
    """The licence of a base model by its name on the hub or by its own card; None if unknown."""
    named = front_matter(folder).get("license")
    if isinstance(named, str):
        return named
    return next((known for start, known in KNOWN.items() if name.startswith(start)), None)
