"""Writes docs/from_nemo.md from the dataclasses that read NeMo's keys.

They are the only place where it is written what becomes of a key. From the project's folder:
`PYTHONPATH=. python docs/make_from_nemo.py`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # before the imports below, which are slow
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    from speechlm2_jax.usage import print_help_if_asked

    print_help_if_asked(__file__)

import ast
import dataclasses
import functools
import importlib
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_TARGETS = ("_target_", "target")
SALM, WITH_ASR, DUPLEX = "SALM", "SALMWithAsrDecoder", "duplex models"
STT = "DuplexSTTModel"
PAGE = Path(__file__).with_name("from_nemo.md")
INTRODUCTION = """\
# Coming from NeMo

A NeMo YAML for SALM runs here unchanged, once its `???` have values:

```bash no-test: needs NeMo's configuration
python train.py --config-path=conf --config-name=salm \\
    data.train_ds.input_cfg.0.cuts_path=train.jsonl.gz \\
    data.validation_ds.datasets.val_set_0.input_cfg.0.cuts_path=dev.jsonl.gz
python train.py --config conf/salm.yaml model.pretrained_llm=/models/TinyLlama +model.lora.r=8
```

`--config` takes a path, or the name of a file in `configs/`. Overrides are Hydra's: `key=value` for
a key that the file has, `+key=value` to add one, `~key` to remove one; items of lists by number
(`input_cfg.0.cuts_path` or `input_cfg[0].cuts_path`). `${a.b}`, `${.sibling}` and
`${oc.env:NAME,default}` are resolved; other resolvers, YAML tags, merge keys (`<<`) and aliases
that expand without a bound are refused. A `_target_` is never imported: its last component chooses
from the names given below.

Every key is one of three:

- **honoured**: it means what it means in NeMo (a few are this project's own).
- **ignored**: it configures torch, Lightning or NeMo internals and has no effect here. It is
  reported once, with the reason.
- **refused**: it is not supported. A value that switches it off is accepted (null, false, 0, empty,
  or the value shown); any other value is an error with the remedy.

A key that no table lists is an error that names the nearest one. Differences of meaning that no key
shows are in [parity.md](parity.md); `evaluate.py` is in [evaluation.md](evaluation.md). This page
is written by `docs/make_from_nemo.py` from the code that reads the keys.
"""


@dataclass(frozen=True, kw_only=True)
class Key:
    """What becomes of one key of a block."""

    name: str
    status: str
    note: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A block of the YAML and what reads it."""

    path: str
    """Dotted path of the block, `*` for any name; further places of it after commas."""
    classes: Mapping[str, type[Any]] = field(default_factory=dict)
    """Name that `_target_` gives -> dataclass; the name is empty where there is one reader."""
    of: str = ""
    """The models that have the block, where others have one of the same name."""
    note: str = ""
    also: tuple[Key, ...] = ()
    """Keys that no dataclass holds."""
    beside: type[Any] | None = None
    """A dataclass whose keys the block has too; another section lists them."""

    @property
    def paths(self) -> list[str]:
        """Every place of the block."""
        return self.path.split(", ")


def one(place: str) -> dict[str, type[Any]]:
    """The dataclass at `module:name`."""
    module, _, name = place.partition(":")
    return {"": getattr(importlib.import_module(f"speechlm2_jax.{module}"), name)}


def table(place: str) -> dict[str, type[Any]]:
    """The registry of dataclasses at `module:name`."""
    return dict(one(place)[""])  # type: ignore[call-overload]


def sections() -> list[Section]:
    """The blocks of a SALM's YAML, in its order."""
    blocks = (
        ("model", "The model: components, LoRA, optimizer."),
        ("trainer", "Steps, precision, devices, strategy."),
        ("data", "Training, validation and test data."),
        ("exp_manager", "Run directory, checkpoints, loggers."),
    )
    top = tuple(Key(name=name, status="honoured", note=note) for name, note in blocks)
    return [
        Section(path="", also=top),
        *model_sections(),
        *trainer_sections(),
        *data_sections(),
        *experiment_sections(),
    ]


def model_sections() -> list[Section]:
    """The blocks of `model`."""
    return [
        Section(path="model", classes=one("pretrained.salm_config:SalmModelConfig")),
        Section(
            path="model",
            of=WITH_ASR,
            classes=one("pretrained.salm_config:SalmAsrDecoderModelConfig"),
            note="Where `perception` is NeMo's AudioTranscriptionPerceptionModule: these keys too.",
            beside=one("pretrained.salm_config:SalmModelConfig")[""],
        ),
        Section(
            path="model",
            of=STT,
            classes=one("pretrained.duplex_stt_config:DuplexSttModelConfig"),
            beside=one("pretrained.salm_config:SalmModelConfig")[""],
        ),
        Section(
            path="model.lora",
            classes=one("layers.lora:LoraConfig"),
            note="Freezes the LLM and trains its adapters, with PEFT's meaning and names.",
        ),
        Section(
            path="model.lora",
            classes=one("layers.automodel_lora:AutomodelLoraConfig"),
            of="SALMAutomodel",
            note="With `model.use_nemo_automodel: true`.",
        ),
        *perception_sections(),
        Section(path="model.optimizer", classes=table("training.optimizer:OPTIMIZERS")),
        Section(path="model.lr_scheduler", classes=table("training.schedules:SCHEDULES")),
    ]


def perception_sections() -> list[Section]:
    """The blocks of `model.perception`."""
    return [
        Section(
            path="model.perception",
            classes=one("perception.perception:PerceptionConfig"),
            note="What the block leaves out comes from `pretrained_asr`.",
        ),
        Section(
            path="model.perception.preprocessor", classes=one("perception.log_mel:LogMelConfig")
        ),
        Section(
            path="model.perception.encoder, model.perception.modality_adapter",
            classes=one("perception.fastconformer_config:FastConformerConfig"),
        ),
        Section(
            path="model.perception.modality_adapter",
            classes=one("perception.modality_adapter:IdentityConfig"),
            note="With `IdentityConnector`.",
        ),
        Section(
            path="model.perception.modality_adapter",
            classes=one("perception.modality_adapter:MultiLayerConfig"),
            note="With `MultiLayerProjectionConnector`.",
        ),
        Section(
            path="model.perception.modality_adapter",
            classes=one("perception.qformer:QformerConfig"),
            note="With `QformerConnector`.",
        ),
        Section(
            path="model.perception.modality_adapter.encoder_config",
            classes=one("perception.qformer:QformerEncoderConfig"),
        ),
        Section(
            path="model.perception.modality_adapter.llm_config",
            classes=one("perception.qformer:QformerLlmConfig"),
        ),
        Section(
            path="model.perception.spec_augment",
            classes=one("perception.spec_augment:SpecAugmentConfig"),
        ),
    ]


def trainer_sections() -> list[Section]:
    """The blocks of `trainer`."""
    return [
        Section(path="trainer", classes=one("training.trainer_config:TrainerConfig")),
        Section(
            path="trainer.strategy",
            classes=table("strategies:STRATEGIES"),
            note="Or a name: auto, ddp, ddp_find_unused_parameters_true, fsdp.",
        ),
    ]


STREAMS = "data.train_ds, data.validation_ds, data.validation_ds.datasets.*"


def data_sections() -> list[Section]:
    """The blocks of `data`."""
    sets = Key(name="datasets", status="honoured", note="Of `validation_ds`: sets by name.")
    inherits = "A set inherits the keys of `validation_ds` and may override them."
    return [
        Section(path="data", of=SALM, classes=one("data.config:DataConfig")),
        Section(path="data", of=DUPLEX, classes=one("data.duplex.config:DuplexDataConfig")),
        Section(
            path="data",
            of=STT,
            classes=one("data.duplex.stt_dataset:DuplexSttDataConfig"),
        ),
        Section(
            path=STREAMS,
            of=SALM,
            classes=one("data.config:DataLoaderConfig"),
            note=inherits,
            also=(sets,),
        ),
        Section(
            path=STREAMS,
            of=DUPLEX,
            classes=one("data.duplex.config:DuplexLoaderConfig"),
            note=inherits,
            also=(sets,),
        ),
        Section(
            path="data.train_ds",
            of="multi_config",
            classes=one("data.fusion:FusionConfig"),
            note="With `multi_config: true`. Each other key holds a block with the keys of a set.",
        ),
        Section(
            path="data.train_ds.input_cfg.*, data.validation_ds.input_cfg.*, "
            "data.validation_ds.datasets.*.input_cfg.*",
            classes=one("data.config:InputConfig"),
            note="One entry of `input_cfg`.",
        ),
    ]


def experiment_sections() -> list[Section]:
    """The blocks of `exp_manager`."""
    return [
        Section(path="exp_manager", classes=one("training.exp_manager:ExpManagerConfig")),
        Section(
            path="exp_manager.checkpoint_callback_params",
            classes=one("training.exp_manager:CheckpointParams"),
        ),
        Section(
            path="exp_manager.summary_writer_kwargs",
            classes=one("training.exp_manager:SummaryWriterParams"),
        ),
    ]


def keys(section: Section) -> list[Key]:
    """Every key of a block, honoured ones first, in the order of the dataclass."""
    found = {key.name: key for key in section.also}
    readers = {key.name: list(section.classes) for key in section.also}
    for target, cls in section.classes.items():
        for key in _keys_of(cls):
            found.setdefault(key.name, key)
            readers.setdefault(key.name, []).append(target)
    everywhere = len(section.classes)
    if section.beside is not None:
        found = {n: k for n, k in found.items() if k not in set(_keys_of(section.beside))}
    return [
        key
        if len(readers[name]) == everywhere
        else dataclasses.replace(key, note=f"{key.note} Only {', '.join(readers[name])}.".strip())
        for name, key in found.items()
    ]


def _keys_of(cls: type[Any]) -> Iterator[Key]:
    notes = attribute_docs(cls)
    for item in dataclasses.fields(cls):
        yield Key(
            name=item.name,
            status="honoured",
            note=f"{notes.get(item.name, '')} {_default(item)}",
        )
    for old, new in getattr(cls, "ALIASES", {}).items():
        yield Key(name=old, status="honoured", note=f"Another name of `{new}`.")
    for name, given in getattr(cls, "IGNORED", {}).items():
        reason = given[0] if isinstance(given, tuple) else given
        yield Key(name=name, status="ignored", note=f"{_sentence(reason)}.")
    for name, refusal in getattr(cls, "REFUSED", {}).items():
        message, *harmless = refusal if isinstance(refusal, tuple) else (refusal,)
        shown = [f"`{_yaml(value)}`" for value in harmless if value]
        accepted = f" Accepted: {', '.join(shown)}." if shown else ""
        yield Key(name=name, status="refused", note=f"{_sentence(message)}.{accepted}")


def attribute_docs(cls: type[Any]) -> dict[str, str]:
    """The docstrings under the fields of a dataclass and its bases, on one line each."""
    docs: dict[str, str] = {}
    for base in reversed([b for b in cls.__mro__ if dataclasses.is_dataclass(b)]):
        tree = ast.parse(textwrap.dedent(_source(base)))
        body = tree.body[0].body  # type: ignore[attr-defined]
        for item, doc in zip(body, body[1:], strict=False):
            if isinstance(item, ast.AnnAssign) and isinstance(doc, ast.Expr):
                text = ast.literal_eval(doc.value)
                docs[item.target.id] = " ".join(text.split())  # type: ignore[union-attr]
    return docs


@functools.lru_cache
def _source(cls: type[Any]) -> str:
    return inspect.getsource(cls)


def _default(item: "dataclasses.Field[Any]") -> str:
    if item.default is not dataclasses.MISSING:
        value = item.default
    elif item.default_factory is not dataclasses.MISSING:
        value = item.default_factory()
    else:
        return "Required."
    return "See below." if dataclasses.is_dataclass(value) else f"Default `{_yaml(value)}`."


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_yaml(v) for v in value)}]"
    return "{}" if isinstance(value, Mapping) else str(value)


def _sentence(text: str) -> str:
    first = text.split(" ", 1)[0]
    is_name = any(mark in first.rstrip(".,;") for mark in "._:=")
    return (text if is_name else text[:1].upper() + text[1:]).rstrip(".")


def targets(section: Section) -> list[str]:
    """What `_target_` may name in a block."""
    names = [name for name in section.classes if name]
    return names + [t for cls in section.classes.values() for t in getattr(cls, "TARGETS", ())]


def render() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for section in sections():
        heading = ", ".join(f"`{path}`" for path in section.paths if path) or "Top level"
        heading += f" ({section.of})" if section.of else ""
        lines = [f"## {heading}", section.note]
        if targets(section):
            names = ", ".join(f"`{t}`" for t in targets(section))
            lines.append(textwrap.fill(f"`_target_` (or `target`): {names}.", 120))
        lines = [line for line in lines if line]
        rows = ["", "| key | here | note |", "|---|---|---|"]
        for key in keys(section):
            note = " ".join(key.note.split()).replace("|", "\\|")
            rows.append(f"| `{key.name}` | {key.status} | {note} |")
        parts.append("\n".join([*lines, *rows]) + "\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
