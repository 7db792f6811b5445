"""The plan of an evaluation: arguments, and defaults from the run that is evaluated."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax import settings
from speechlm2_jax.evaluation.add_noise import add_noise
from speechlm2_jax.evaluation.config import EvalConfig, output_file
from speechlm2_jax.evaluation.inputs import Utterance, left_out, read_inputs
from speechlm2_jax.evaluation.metrics.wer import text_normalizer
from speechlm2_jax.evaluation.results import TrainingSummary
from speechlm2_jax.evaluation.run_directories import Run, bundled_test_set, newest_run, read_run
from speechlm2_jax.evaluation.swap_audio import swap_audio
from speechlm2_jax.evaluation.training_data import TrainingData
from speechlm2_jax.object_store.folders import shown
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError

ENCODER = "encoder"
"""The value of `draft` that means the CTC head of the run's own encoder."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """A complete configuration, and the run that its defaults come from."""

    config: EvalConfig
    run: Run | None
    """The evaluated run, if the model is a run directory."""
    encoder_file: Path | None
    """File of the encoder whose CTC head is scored beside the model, if any."""
    given: frozenset[str]
    """Keys set on the command line."""
    draft_file: Path | None = None
    """The ASR model whose transcripts are drafts, if any."""

    @functools.cached_property
    def training(self) -> TrainingData | None:
        """What the training manifests of the run hold; None without a run."""
        normalize = text_normalizer(self.config.use_normalizer)
        return None if self.run is None else self.run.training_data(normalize)

    def training_summary(self) -> TrainingSummary | None:
        """What was searched for the inputs; None if nothing of the training could be read."""
        if self.training is None or not self.training.rows:
            return None
        return TrainingSummary(rows=self.training.rows, unread=tuple(self.training.unread))

    @property
    def step(self) -> int | None:
        """The training step of the weights, if a run is evaluated."""
        return None if self.run is None else self.run.step[0]

    def utterances(self) -> list[Utterance]:
        """The inputs, with unseen voices marked, and with swapped or noisy audio if that is wanted.

        Raises SettingsError for inputs that cannot be used.
        """
        utterances = read_inputs(self.config.inputs, self._tags())
        if self.training is not None:
            utterances = self.training.marked(utterances)
        if self.config.swap_audio:
            utterances = swap_audio(utterances, text_normalizer(self.config.use_normalizer))
        if self.config.noise is not None:
            utterances = add_noise(utterances, self.config.noise, self.config.snr_db)
        return utterances

    def output(self, key: str) -> Path | None:
        """The output file of argument `key`, or None. Raises SettingsError for a bad path."""
        return output_file(key, getattr(self.config, key), self._inputs())

    def _inputs(self) -> tuple[str, ...]:
        inputs = self.config.inputs
        return (inputs,) if isinstance(inputs, str) else inputs

    def _tags(self) -> dict[str, object]:
        """What `input_cfg` calls tags, for conversations."""
        tags = {"context": self.config.user_prompt, "system_prompt": self.config.system_prompt}
        return {name: text for name, text in tags.items() if text is not None}

    def summary(self, utterances: Sequence[Utterance] = ()) -> str:
        """Model, data and prompt, as lines for the terminal."""
        config, run = self.config, self.run
        model = ("model", config.pretrained_name)
        if run is not None:
            step, why = run.step
            model = ("run", f"{shown(run.folder)}, step {step} ({why})")
        prompt = " ".join(repr(t) for t in (config.system_prompt, config.user_prompt) if t)
        as_trained = run is not None and "user_prompt" not in self.given
        lines = [
            model,
            ("data", ", ".join(self._inputs())),
            ("prompt", (prompt or "the audio alone") + ", as trained" * as_trained),
        ]
        if dialogs := sum(u.dialog is not None for u in utterances):
            lines.append(("prompt", f"of {dialogs} conversations: their own turns"))
        for missed in filter(None, (left_out(Path(p).expanduser()) for p in self._inputs())):
            lines.append(("note", missed))
        if config.swap_audio:
            lines.append(("audio", "SWAPPED: every utterance gets the recording of another"))
        if config.noise is not None:
            lines.append(("audio", f"NOISY: {config.noise} at {config.snr_db:g} dB is mixed in"))
        if run is not None and run.is_remote and "inputs" not in self.given:
            lines.append(("output", f"{run.output_folder}/, as the run is at an address"))
        return "\n".join(f"{name:<6} {value}" for name, value in lines)


def make_plan(arguments: Mapping[str, object]) -> EvaluationPlan:
    """Checks the arguments and fills in defaults.

    Raises SettingsError for a wrong key or value, and if there is no run or no test set.
    """
    # bad arguments are reported before run and test set are looked for
    settings.build(EvalConfig, {"pretrained_name": "", "inputs": "", **arguments})
    run = (
        read_run(str(arguments["pretrained_name"]))
        if "pretrained_name" in arguments
        else newest_run()
    )
    defaults: dict[str, Any] = {}
    if run is not None:
        defaults |= {"pretrained_name": str(run.folder), **_as_in_training(run)}
    encoder_file = run.encoder_file() if run is not None else None
    if "inputs" not in arguments:
        defaults |= {"inputs": str(bundled_test_set()), **_default_outputs(arguments, run)}
        defaults["controls"] = not arguments.get("swap_audio")
        defaults["encoder_wer"] = encoder_file is not None and not arguments.get("swap_audio")
    config = settings.build(EvalConfig, {**defaults, **arguments})
    if config.encoder_wer and encoder_file is None:
        raise SettingsError(
            "encoder_wer: needs a run directory whose config.yaml names a pretrained_asr that is "
            "on this machine; leave it out"
        )
    return EvaluationPlan(
        config=config,
        run=run,
        encoder_file=encoder_file if config.encoder_wer else None,
        given=frozenset(arguments),
        draft_file=_draft_file(config, encoder_file),
    )


def _draft_file(config: EvalConfig, encoder_file: Path | None) -> Path | None:
    """The file that `draft` names. Raises SettingsError if there is none."""
    if config.draft is None:
        return None
    if config.draft == ENCODER:
        if encoder_file is None:
            raise SettingsError(
                "draft: encoder needs a run directory whose config.yaml names a pretrained_asr "
                "that is on this machine; name the .nemo file of an ASR model"
            )
        return encoder_file
    return Location().find(config.draft, key="draft")


def _as_in_training(run: Run) -> dict[str, Any]:
    """Prompt, dtype and text normalisation of the training and its validation."""
    longest = {} if run.max_audio_s is None else {"max_audio_s": run.max_audio_s}
    return {
        **longest,
        "user_prompt": run.tag("context"),
        "system_prompt": run.tag("system_prompt"),
        "dtype": run.dtype,
        "use_normalizer": "basic",
    }


def _default_outputs(arguments: Mapping[str, object], run: Run | None) -> dict[str, Any]:
    """Output manifest and report in the run's folder, and no texts on the terminal."""
    changed = "_swapped" if arguments.get("swap_audio") else ""
    if arguments.get("noise") is not None:
        changed += f"_noise_{arguments.get('snr_db', EvalConfig.snr_db):g}dB"
    folder = Path() if run is None else run.output_folder
    return {
        "output_manifest": str(folder / f"answers{changed}.jsonl"),
        "report": str(folder / f"report{changed}.html"),
        "verbose": False,
    }
