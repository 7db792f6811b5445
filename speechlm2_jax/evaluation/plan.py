"""What to evaluate where the command line does not say: the newest run, as it was trained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from speechlm2_jax import settings
from speechlm2_jax.evaluation.config import EvalConfig, output_file
from speechlm2_jax.evaluation.inputs import Utterance, left_out, read_inputs
from speechlm2_jax.evaluation.metrics.wer import text_normalizer
from speechlm2_jax.evaluation.run_directories import Run, bundled_test_set, newest_run, read_run
from speechlm2_jax.evaluation.swap_audio import swap_audio
from speechlm2_jax.settings import SettingsError


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """A complete configuration, and where its parts come from."""

    config: EvalConfig
    run: Run | None
    """The run directory that is evaluated, if it is one."""
    encoder_file: Path | None
    """Whose CTC head to score beside the model, if any."""
    given: frozenset[str]
    """The keys of the command line."""

    @property
    def step(self) -> int | None:
        """The training step whose weights answer, if a run is evaluated."""
        return None if self.run is None else self.run.step[0]

    def utterances(self) -> list[Utterance]:
        """What will be heard: the inputs, with unseen voices marked and audio swapped if asked.

        Raises SettingsError for inputs that cannot be used.
        """
        utterances = read_inputs(self.config.inputs)
        heard = self.run.training_voices() if self.run is not None else frozenset()
        if heard:
            utterances = [
                replace(u, is_unseen=u.voice is not None and u.voice not in heard)
                for u in utterances
            ]
        if self.config.swap_audio:
            utterances = swap_audio(utterances, text_normalizer(self.config.use_normalizer))
        return utterances

    def output(self, key: str) -> Path | None:
        """The file that a key names, if any. Raises SettingsError if none can be written there."""
        return output_file(key, getattr(self.config, key), [self.config.inputs])

    def summary(self) -> str:
        """What is about to be evaluated, for a reader."""
        config, run = self.config, self.run
        model = ("model", config.pretrained_name)
        if run is not None:
            step, why = run.step
            model = ("run", f"{run.folder}, step {step} ({why})")
        asked = " ".join(repr(t) for t in (config.system_prompt, config.user_prompt) if t)
        as_trained = run is not None and "user_prompt" not in self.given
        lines = [
            model,
            ("data", config.inputs),
            ("asked", (asked or "nothing beside the audio") + ", as trained" * as_trained),
        ]
        if missed := left_out(Path(config.inputs).expanduser()):
            lines.append(("note", missed))
        if config.swap_audio:
            lines.append(("audio", "SWAPPED: every utterance hears the recording of another"))
        return "\n".join(f"{name:<6} {value}" for name, value in lines)


def make_plan(words: Mapping[str, Any]) -> EvaluationPlan:
    """Checks the keys of a command line and fills in the others.

    Raises SettingsError for a key or value that cannot be used, no run, or no test set.
    """
    # bad words are told before anything is looked for
    settings.build(EvalConfig, {"pretrained_name": "", "inputs": "", **words})
    run = read_run(str(words["pretrained_name"])) if "pretrained_name" in words else newest_run()
    defaults: dict[str, Any] = {}
    if run is not None:
        defaults |= {"pretrained_name": str(run.folder), **_as_trained(run)}
    encoder_file = run.encoder_file() if run is not None else None
    if "inputs" not in words:
        defaults |= {"inputs": str(bundled_test_set()), **_out_of_the_box(words, run)}
        defaults["encoder_wer"] = encoder_file is not None and not words.get("swap_audio")
    config = settings.build(EvalConfig, {**defaults, **words})
    if config.encoder_wer and encoder_file is None:
        raise SettingsError(
            "encoder_wer: needs a run directory whose config.yaml names a pretrained_asr that is "
            "on this machine; leave it out"
        )
    return EvaluationPlan(
        config=config,
        run=run,
        encoder_file=encoder_file if config.encoder_wer else None,
        given=frozenset(words),
    )


def _as_trained(run: Run) -> dict[str, Any]:
    """Asked, computed and compared as training and its validation did."""
    longest = {} if run.max_audio_s is None else {"max_audio_s": run.max_audio_s}
    return {
        **longest,
        "user_prompt": run.tag("context"),
        "system_prompt": run.tag("system_prompt"),
        "dtype": run.dtype,
        "use_normalizer": "basic",
    }


def _out_of_the_box(words: Mapping[str, Any], run: Run | None) -> dict[str, Any]:
    """Answers and page beside the run, and a quiet terminal."""
    swapped = "_swapped" if words.get("swap_audio") else ""
    folder = Path() if run is None else run.folder
    return {
        "output_manifest": str(folder / f"answers{swapped}.jsonl"),
        "report": str(folder / f"report{swapped}.html"),
        "verbose": False,
    }
