"""Finds the model of a command line, and plans the evaluation of a duplex model."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax import settings
from speechlm2_jax.data.duplex.dataset import DuplexS2SDataset
from speechlm2_jax.evaluation.config import output_file
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.duplex.inputs import (
    Dialogue,
    check_speakers,
    read_dialogues,
    sets_of_run,
)
from speechlm2_jax.evaluation.inputs import left_out
from speechlm2_jax.evaluation.run_directories import Run, newest_run, read_run
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.object_store.folders import shown
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.pretrained.near_paths import check_run_name
from speechlm2_jax.pretrained.save_load import open_model
from speechlm2_jax.settings import SettingsError
from speechlm2_jax.settings.errors import unknown

MODEL = "pretrained_name"


@dataclass(frozen=True, kw_only=True)
class ModelFound:
    """What is known of a model before its weights are loaded."""

    run: Run | None
    cfg: Mapping[str, object]
    """Its `model:` block; empty if the model is not on this machine."""
    near: tuple[Path, ...] = ()
    """Folders in which its components are looked for."""

    @property
    def is_duplex(self) -> bool:
        """Whether it is one of the duplex classes."""
        return registry.of_config(self.cfg) in registry.DUPLEX_MODELS


def find_model(arguments: Mapping[str, object]) -> ModelFound:
    """The model of a command line: `pretrained_name`, else the newest run.

    Raises SettingsError if `pretrained_name` is misspelt, there is no run, or the model is of a
    kind that is not evaluated.
    """
    # a misspelt pretrained_name would evaluate the newest run; other keys are checked by its plan
    if near := difflib.get_close_matches(MODEL, set(arguments) - {MODEL}, n=1):
        raise SettingsError(unknown(near[0], near[0], [MODEL]))
    given = arguments.get("pretrained_name")
    run = newest_run() if "pretrained_name" not in arguments else read_run(str(given))
    name = str(given) if run is None else str(run.folder)
    path = Location().local(name)
    if path is None:
        check_run_name(name, key="pretrained_name")
    kind = None if path is None else registry.identify(path)
    if kind is not None and not set(kind.classes) & set(registry.SPEECH_MODELS):
        raise SettingsError(f"pretrained_name: {kind.sentence(name)}")
    if run is not None and run.settings:
        return ModelFound(run=run, cfg=run.settings.get("model") or {})
    if path is None:
        return ModelFound(run=run, cfg={})
    try:
        source = open_model(name)
    except SettingsError:  # raised again, with its key, when the model is loaded
        return ModelFound(run=run, cfg={})
    return ModelFound(run=run, cfg=source.cfg, near=source.near)


@dataclass(frozen=True, kw_only=True)
class DuplexPlan:
    """A complete configuration, and the run that its defaults come from."""

    config: DuplexEvalConfig
    run: Run | None
    dialogues: Sequence[Dialogue]

    @property
    def step(self) -> int | None:
        """The training step of the weights, if a run is evaluated."""
        return None if self.run is None else self.run.step[0]

    def output(self, key: str) -> Path | None:
        """The output file of argument `key`, or None. Raises SettingsError for a bad path."""
        return output_file(key, getattr(self.config, key), _listed(self.config.inputs))

    def dataset(self, model: DuplexS2SModel) -> DuplexS2SDataset:
        """The dataset that turns dialogues into examples."""
        return DuplexS2SDataset(
            model.tokenizer,
            frame_length=model.token_equivalent_duration,
            source_sample_rate=model.sampling_rate,
            target_sample_rate=model.target_sampling_rate,
            input_roles=self.config.input_roles,
            output_roles=self.config.output_roles,
            max_frames=model.max_frames,
        )

    def summary(self) -> str:
        """Model, data and scoring ASR model, as lines for the terminal."""
        config, run = self.config, self.run
        model = ("model", config.pretrained_name)
        if run is not None:
            step, why = run.step
            model = ("run", f"{shown(run.folder)}, step {step} ({why})")
        counts: dict[str, int] = {}
        for dialogue in self.dialogues:
            counts[dialogue.set_name] = counts.get(dialogue.set_name, 0) + 1
        sets = ", ".join(f"{name} ({count} conversations)" for name, count in counts.items())
        asr = config.scoring_asr or "none: the agent's speech is not transcribed (scoring_asr)"
        lines = [model, ("data", sets), ("ASR", asr)]
        if run is not None and run.is_remote and config.inputs is None:
            lines.append(("output", f"{run.output_folder}/, as the run is at an address"))
        missed = [left_out(Path(value).expanduser()) for value in _listed(config.inputs)]
        lines += [("note", note) for note in missed if note]
        return "\n".join(f"{name:<6} {value}" for name, value in lines)


def _listed(inputs: str | Sequence[str] | None) -> Sequence[str]:
    return (inputs,) if isinstance(inputs, str) else inputs or ()


def make_duplex_plan(arguments: Mapping[str, object], found: ModelFound) -> DuplexPlan:
    """Checks the arguments, fills in defaults, and lists the conversations.

    Raises SettingsError for a wrong key or value, for inputs that cannot be read, and for a speaker
    who is neither user nor agent.
    """
    settings.build(DuplexEvalConfig, {"pretrained_name": "", **arguments})
    defaults: dict[str, Any] = {"scoring_asr": _scoring_asr(found)}
    data: Mapping[str, Any] = {}
    if found.run is not None:
        data = found.run.settings.get("data") or {}
        defaults |= {"pretrained_name": str(found.run.folder), "dtype": found.run.dtype}
        roles = {key: data.get(key) for key in ("input_roles", "output_roles")}
        defaults |= {key: value for key, value in roles.items() if value is not None}
        if arguments.get("inputs") is None:
            defaults |= _beside(found.run)
    config = settings.build(DuplexEvalConfig, {**defaults, **arguments})
    if config.inputs is None:
        dialogues = sets_of_run(data)
    else:
        rate_hz = (data.get("validation_ds") or {}).get("sample_rate")
        dialogues = read_dialogues(_listed(config.inputs), rate_hz)
    check_speakers(dialogues, config.input_roles, config.output_roles)
    return DuplexPlan(config=config, run=found.run, dialogues=dialogues)


def _beside(run: Run) -> dict[str, Any]:
    """Outputs in the run's folder, and no texts on the terminal."""
    names = {"output_manifest": "answers.jsonl", "audio_folder": "answers", "report": "report.html"}
    return {**{key: str(run.output_folder / name) for key, name in names.items()}, "verbose": False}


def _scoring_asr(found: ModelFound) -> str | None:
    """The scoring ASR model of the training, if it is on this machine."""
    name = found.cfg.get("scoring_asr")
    if not name:
        return None
    if found.run is not None and (file := found.run.find_file(str(name))) is not None:
        return str(file)
    near = Location(near=found.near).local(str(name))
    return None if near is None else str(near)
