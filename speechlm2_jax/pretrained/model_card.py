"""README.md of a saved model, with the YAML front matter that the Hugging Face hub reads."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from speechlm2_jax.layers.lora import LoraConfig
from speechlm2_jax.layers.module import Variables
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.blueprint import Blueprint
from speechlm2_jax.pretrained.licences import kept_facts, licence_of
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.pretrained.run_facts import RunFacts, read_run_facts

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMPONENTS = {
    "pretrained_llm": "LLM",
    "pretrained_asr": "audio encoder",
    "pretrained_audio_codec": "audio codec",
}
"""Key of the `model:` block -> what it names."""
PLACEHOLDER = "PATH"
"""Stands for the name of a model that has none yet."""
SALM_TASK = "automatic-speech-recognition"
DUPLEX_TASK = "audio-to-audio"
LLM_TASK = "text-generation"
SALM_USE = """\
```python
import speechlm2_jax as slm

model = slm.models.{kind}.from_pretrained("{name}")
prompt = f"Transcribe the following: {{model.audio_locator_tag}}"
ids = model.generate(
    prompts=[[{{"role": "user", "content": prompt, "audio": ["speech.wav"]}}]], max_new_tokens=128
)
print(model.tokenizer.ids_to_text(ids[0]))
```

NeMo 3.0.0 opens the same directory{condition}:

```python
from nemo.collections.speechlm2.models import {kind}

model = {kind}.from_pretrained("{name}").eval()
prompt = f"Transcribe the following: {{model.audio_locator_tag}}"
ids = model.generate(
    prompts=[[{{"role": "user", "content": prompt, "audio": ["speech.wav"]}}]], max_new_tokens=128
)
print(model.tokenizer.ids_to_text(ids[0].cpu()))
```
"""
DUPLEX_USE = """\
```python
import numpy as np
import soundfile
import speechlm2_jax as slm

model = slm.models.{kind}.from_pretrained("{name}")
audio, rate = soundfile.read("user.wav", dtype="float32")  # mono, at model.sampling_rate
result = model.offline_inference(audio[None], np.array([len(audio)]))
soundfile.write("agent.wav", result["audio"][0], model.target_sampling_rate)
print(result["text"][0])
```

NeMo 3.0.0 opens the same directory with
`nemo.collections.speechlm2.models.{kind}.from_pretrained("{name}")`.
"""
WITH_ASR_FILE = " where the `.nemo` file that `pretrained_asr` names exists"
LLM_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

As the LLM of a new speech model: `model.pretrained_llm: {name}` in a training configuration of
speechlm2_jax or NeMo.
"""


@dataclass(frozen=True, kw_only=True)
class CardInput:
    """What a model card is written from."""

    blueprint: Blueprint
    variables: Variables
    """Shapes are read, no values."""
    dtype: str
    merged: LoraConfig | None = None
    """LoRA that became part of the weights."""
    is_llm: bool = False
    """True for the LLM alone."""
    name: str = PLACEHOLDER
    """Name on the hub, for the examples."""


def model_card(card: CardInput) -> str:
    """The text of README.md."""
    facts = read_run_facts(card.blueprint.origin)
    head = yaml.safe_dump(_front_matter(card, facts), sort_keys=False, allow_unicode=True)
    kind = registry.of_config(card.blueprint.cfg) or registry.SALM
    what = f"the LLM of {kind.what}" if card.is_llm else kind.what
    use = LLM_USE if card.is_llm else DUPLEX_USE if kind in registry.DUPLEX_MODELS else SALM_USE
    condition = WITH_ASR_FILE if kind is registry.SALM_WITH_ASR else ""
    parts = [
        f"---\n{head}---",
        f"# {card.name if card.name != PLACEHOLDER else what[0].upper() + what[1:]}",
        f"This is {what}, written by speechlm2_jax.",
        _table(_facts_of_model(card)),
        "## Use",
        use.format(name=card.name, kind=kind.classes[0], condition=condition).strip(),
        *_training(facts),
        "## Licence",
        _licence_text(card),
    ]
    return "\n\n".join(parts) + "\n"


def base_models(blueprint: Blueprint, *, is_llm: bool = False) -> dict[str, str]:
    """What each component is -> its name on the hub, or the last part of a local path."""
    named = blueprint.named or blueprint.cfg
    keys = ["pretrained_llm"] if is_llm else list(COMPONENTS)
    return {
        COMPONENTS[key]: name if _is_hub_name(name, blueprint.near) else Path(name).name
        for key in keys
        if isinstance(name := named.get(key), str)
    }


def _is_hub_name(name: str, near: tuple[Path, ...]) -> bool:
    """Whether a component's name is that of a repository: OWNER/NAME that is no local path."""
    return HUB_NAME.fullmatch(name) is not None and Location(near=near).local(name) is None


def _front_matter(card: CardInput, facts: RunFacts) -> dict[str, Any]:
    names = base_models(card.blueprint, is_llm=card.is_llm)
    licences = {licence_of(n, _folder(card.blueprint, what)) for what, n in names.items()}
    (licence,) = licences if len(licences) == 1 else (None,)
    is_duplex = registry.of_config(card.blueprint.cfg) in registry.DUPLEX_MODELS
    bases = [name for name in names.values() if "/" in name]
    made: dict[str, Any] = {
        "license": licence,
        "library_name": "transformers" if card.is_llm else "NeMo",
        "pipeline_tag": LLM_TASK if card.is_llm else DUPLEX_TASK if is_duplex else SALM_TASK,
        "base_model": bases,
        "tags": ["speechlm2_jax", *([] if card.is_llm else ["NeMo", "speech"])],
        "model-index": _model_index(card, facts),
    }
    kept = kept_facts(card.blueprint.origin)
    if card.is_llm:
        kept.pop("model-index", None)
    return {k: v for k, v in made.items() if v} | kept


def _model_index(card: CardInput, facts: RunFacts) -> list[dict[str, Any]]:
    """The word error rate as the hub shows it."""
    if facts.wer is None or card.is_llm:
        return []
    result = {
        "task": {"type": "automatic-speech-recognition"},
        "dataset": {"type": facts.test_set, "name": facts.test_set},
        "metrics": [{"type": "wer", "name": "WER", "value": round(100 * facts.wer, 2)}],
    }
    return [{"name": card.name, "results": [result]}]


def _facts_of_model(card: CardInput) -> dict[str, str]:
    network = card.blueprint.network
    prefix = "llm." if card.is_llm else ""
    own = [x for path, x in card.variables.items() if path.startswith(prefix)]
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in own)
    facts = base_models(card.blueprint, is_llm=card.is_llm)
    lora = network.lora or card.merged
    if lora is not None:
        where = "merged into the weights" if card.merged is not None else "beside the weights"
        targets = ", ".join(sorted(lora.target_modules or ()))
        facts["LoRA"] = f"r {lora.r}, alpha {lora.lora_alpha}, on {targets}; {where}"
    facts["LLM's architecture"] = f"{network.llm.family}, {network.llm.layers} layers"
    facts["parameters"] = f"{count:,}"
    facts["dtype"] = card.dtype
    if not card.is_llm:
        facts["input audio"] = f"{network.perception.preprocessor.sample_rate} Hz, mono"
        if (prompt_format := card.blueprint.cfg.get("prompt_format")) is not None:
            facts["prompt format"] = str(prompt_format)
    return facts


def _training(facts: RunFacts) -> list[str]:
    """The section about the training; nothing if nothing is known."""
    known: dict[str, str] = {}
    if facts.step is not None:
        known["optimizer steps"] = f"{facts.step:,}"
    if facts.data:
        known["training data"] = ", ".join(facts.data)
    known |= {name: f"{value:.4g}" for name, value in (facts.validation or {}).items()}
    if facts.wer is not None:
        known[f"WER on {facts.test_set}"] = f"{facts.wer:.2%}"
    return ["## Training", _table(known)] if known else []


def _licence_text(card: CardInput) -> str:
    own = kept_facts(card.blueprint.origin).get("license")
    lines = [] if own is None else [f"This model: {own}."]
    for what, name in base_models(card.blueprint, is_llm=card.is_llm).items():
        known = licence_of(name, _folder(card.blueprint, what))
        lines.append(f"- {what} {name}: {known or 'unknown; see its own model card'}")
    return "\n".join(lines)


def _folder(blueprint: Blueprint, what: str) -> Path | None:
    """The folder of a component, which may have a model card of its own."""
    if what == COMPONENTS["pretrained_llm"]:
        return blueprint.llm_directory
    if what == COMPONENTS["pretrained_asr"] and blueprint.asr_file is not None:
        return blueprint.asr_file.parent
    return None


def _table(rows: Mapping[str, str]) -> str:
    cells = [("", ""), ("---", "---"), *rows.items()]
    return "\n".join(f"| {name} | {value} |" for name, value in cells)
