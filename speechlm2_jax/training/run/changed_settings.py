"""Compares the settings of a resumed run with those of its checkpoint.

- A change of optimizer, schedule, data, devices or logging is accepted and logged.
- A change that gives the trained weights another meaning is refused: another architecture,
  tokenizer or prompt format. `exp_manager.resume_allow_changes` accepts it.
- A tokenizer whose files were edited, at the same path, counts as another tokenizer.
- Of the keys of `model`, only those in `ACCEPTED` may change. A key that is not listed is refused.
"""

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speechlm2_jax import checkpointing
from speechlm2_jax.checkpointing import (
    CHECKPOINTS,
    DamagedError,
    read_checksums,
    step_folders,
)
from speechlm2_jax.settings import SettingsError, parse_yaml, read_json
from speechlm2_jax.training.protocol import HasTokenizer, ModelOutline, NormalizesSettings
from speechlm2_jax.training.run.directory import CONFIG, MODEL

log = logging.getLogger(__name__)

ACCEPTED = (
    "model.optimizer",
    "model.lr_scheduler",
    "model.init_from_checkpoint",  # the weights come from the run's own checkpoint
    "model.pretrained_weights",
    "model.seed",  # of the random start
    "model.llm.init_std",
    "model.freeze_params",  # a layout that the checkpoint does not have is refused by itself
    "model.prevent_freeze_params",
    "model.scoring_asr",
    "model.text_loss_weight",
    "model.audio_loss_weight",
    "model.spec_augment",
    "model.perception.spec_augment",
    "model.lora.lora_dropout",
    "model.speech_decoder.p_dropout",
    "model.speech_decoder.p_dropout_out",
    "model.model_type",
    "model.architectures",
    "model.torch_dtype",
)
"""Keys of the model that change how it trains, and not what it computes. Keys below them too."""
ACCEPTED_PATTERN = re.compile(
    r"model\.(perception\.)?(encoder|modality_adapter)\.(dropout\w*|att_context_probs)"
    r"|model\.(perception\.)?preprocessor\.dither"
)
REFUSED_DATA = re.compile(
    r"data\.(train_ds\.(.*\.)?(prompt_format|audio_locator_tag|token_equivalent_duration"
    r"|sample_rate)|source_sample_rate|target_sample_rate|frame_length)"
)
"""Keys of the data that change the model's input for the same recording and text."""
UNLISTED = re.compile(
    r"exp_manager\.(resume_\w+|explicit_log_dir|exp_dir|name|version|use_datetime_version)"
)
"""Keys that name the run directory or control resuming. Changes of them are not logged."""
BLOCKS = ("trainer", "data", "exp_manager")
TOKENIZER = "tokenizer"
"""Key, in the notes of the checksums of model/, of the checksum of the tokenizer's files."""
MAX_NAMED = 5
NOT_SET = "not set"


@dataclass(frozen=True, kw_only=True)
class Change:
    """A key whose value has changed."""

    key: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.after)}"

    @property
    def is_refused(self) -> bool:
        """Whether the change would give the weights another meaning."""
        if self.key.startswith("model"):
            below = any(self.key == key or self.key.startswith(f"{key}.") for key in ACCEPTED)
            return not (below or ACCEPTED_PATTERN.fullmatch(self.key))
        is_other_value = self.before is not None and self.after is not None
        return bool(REFUSED_DATA.fullmatch(self.key)) and is_other_value


def check_resumed(
    sources: Sequence[Path | None],
    model: ModelOutline,
    settings: Mapping[str, object],
    *,
    allows_changes: bool,
) -> None:
    """Compares the settings of a run with those of the checkpoint that it resumes from.

    `sources` are folders of checkpoints, in the order in which they are tried. Logs a line for each
    accepted change. Raises SettingsError for refused changes.
    """
    steps = next((found for s in sources if s is not None and (found := step_folders(s))), [])
    before = next((read for step in steps if (read := _settings_of(step)) is not None), None)
    if before is None:
        return
    changes = [
        *_model_changes(before, model),
        *_tokenizer_changes(before, model),
        *_other_changes(before, settings),
    ]
    refused = [change for change in changes if change.is_refused]
    if refused and not allows_changes:
        raise SettingsError(_refusal(steps[0], refused))
    for change in changes:
        log.info("changed since the checkpoint: %s", change)


def is_other_model(run_dir: Path, settings: Mapping[str, object]) -> bool:
    """Whether the `model` block of `settings` gives the weights of the run another meaning."""
    before = _config_of(run_dir).get("model")
    if not isinstance(before, Mapping) or "model" not in settings:
        return False
    return any(change.is_refused for change in changes_of(before, settings["model"], "model"))


def changes_of(before: object, after: object, key: str) -> Iterator[Change]:
    """The keys whose values differ. A key that is not set counts as null."""
    parts = [_parts_of(before), _parts_of(after)]
    if (before is None and parts[1] is not None) or (after is None and parts[0] is not None):
        # an unset block becomes an empty one, so that each key of the other is listed
        parts = [{} if found is None else found for found in parts]
    old, new = parts
    if old is not None and new is not None:
        for name in dict.fromkeys([*old, *new]):
            yield from changes_of(old.get(name), new.get(name), f"{key}.{name}")
    elif not _are_equal(before, after):
        yield Change(key=key, before=before, after=after)


def _model_changes(before: Mapping[str, Any], model: ModelOutline) -> Iterator[Change]:
    settings, after = before["model"], model.settings
    if isinstance(model, NormalizesSettings):
        with contextlib.suppress(ValueError):  # of another kind of model, or of another version
            pair = (
                model.normalized_settings(settings, before["definitions"]),
                model.normalized_settings(after, None),
            )
            settings, after = pair
    return changes_of(settings, after, "model")


def _tokenizer_changes(before: Mapping[str, Any], model: ModelOutline) -> Iterator[Change]:
    """A change of the tokenizer's files. Checkpoints of older versions have no checksum of them."""
    if not isinstance(model, HasTokenizer):
        return
    known, contents = before[TOKENIZER], model.tokenizer.contents
    if known is not None and contents is not None and known != contents:
        old, new = (f"files of checksum {one[:12]}" for one in (known, contents))
        yield Change(key=f"model.tokenizer ({model.tokenizer.name})", before=old, after=new)


def _other_changes(
    before: Mapping[str, object], settings: Mapping[str, object]
) -> Iterator[Change]:
    for block in BLOCKS:
        if block in before and block in settings:
            for change in changes_of(before[block], settings[block], block):
                if not UNLISTED.fullmatch(change.key):
                    yield change


def _settings_of(step: Path) -> dict[str, Any] | None:
    """The settings of a checkpoint and of the run that wrote it; None if they cannot be read."""
    try:
        model = checkpointing.read_item(step, "settings")
    except Exception as error:  # a damaged checkpoint: `restore` knows what to do about it
        log.debug("cannot read the settings of %s (%s)", step, error)
        return None
    folder = step.parent
    run_dir = folder.parent if folder.name == CHECKPOINTS else folder
    return {
        **_config_of(run_dir),
        "model": model,
        "definitions": _definitions_of(run_dir),
        TOKENIZER: _tokenizer_of(run_dir),
    }


def _config_of(run_dir: Path) -> dict[str, Any]:
    """config.yaml of a run directory; empty if it cannot be read."""
    try:
        values = parse_yaml((run_dir / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _definitions_of(run_dir: Path) -> dict[str, Any]:
    """Folder of each pretrained component -> the contents of its config.json."""
    found = {}
    for path in (run_dir / MODEL).glob("*/config.json"):
        with contextlib.suppress(SettingsError):
            found[path.parent.name] = read_json(path)
    return found


def _tokenizer_of(run_dir: Path) -> str | None:
    """The checksum of the tokenizer that a run was trained with; None if it is unknown."""
    with contextlib.suppress(DamagedError):
        checksums = read_checksums(run_dir / MODEL)
        return None if checksums is None else checksums.notes.get(TOKENIZER)
    return None


def _refusal(step: Path, refused: Sequence[Change]) -> str:
    named = "; ".join(str(change) for change in refused[:MAX_NAMED])
    more = f"; and {len(refused) - MAX_NAMED} more" if len(refused) > MAX_NAMED else ""
    return (
        f"{step} was trained with other settings, which change what its weights mean: {named}"
        f"{more}. Use the settings of that run, choose another exp_manager.explicit_log_dir, or "
        "set +exp_manager.resume_allow_changes=true"
    )


def _shown(value: object) -> str:
    text = NOT_SET if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parts_of(value: object) -> dict[str, Any] | None:
    """The values of a mapping or a list, by key or index; None for a single value."""
    if isinstance(value, Mapping):
        return {str(name): part for name, part in value.items()}
    if isinstance(value, list | tuple):
        return {str(place): part for place, part in enumerate(value)}
    return None


def _are_equal(before: object, after: object) -> bool:
    if before == after:
        return True
    if not (isinstance(before, str) and isinstance(after, str)):
        return False
    try:
        return Path(before).exists() and Path(before).samefile(after)
    except (OSError, ValueError):
        return False
