"""`model.init_from_checkpoint`: a new training starts from the weights of a trained model.

As in NeMo, tensors are matched by name. Tensors that the checkpoint lacks are initialized as
without it; tensors that the model lacks are ignored. Both are logged by name. Only weights are
read: optimizer, schedule and data start from the beginning.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from speechlm2_jax import checkpointing
from speechlm2_jax.arrays import AnyArray
from speechlm2_jax.conversion import mapping
from speechlm2_jax.conversion.errors import ConversionError, listed
from speechlm2_jax.conversion.mapping import Place, Rule, Table
from speechlm2_jax.conversion.quantizing import dequantized
from speechlm2_jax.conversion.readers import LazySource, memory_source, open_weights
from speechlm2_jax.layers.module import VariableInfo, Variables
from speechlm2_jax.layers.quantized import is_quantized
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError

KEY = "model.init_from_checkpoint"
PEFT_INFIXES = ((".base_model.model.", "."), (".base_layer.", "."))
"""What PEFT adds to parameter names of an LLM with adapters -> the plain LLM's name."""
KEY_OF_CLASS: Mapping[str, str] = {
    "ASRModel": "model.pretrained_asr",
    "CTCModel": "model.pretrained_asr, after python convert.py RUN NAME.nemo",
    "AudioCodec": "model.pretrained_audio_codec",
}
_log = logging.getLogger(__name__)


def find(name: str, near: tuple[Path, ...]) -> Path:
    """The checkpoint that `model.init_from_checkpoint` names, downloaded if necessary.

    Raises SettingsError if there is none, or if it belongs to another key.
    """
    path = Location(near=near).find(name, key=KEY)
    kind = registry.identify(path)
    if kind is None or set(kind.classes) & set(registry.SPEECH_MODELS):
        return path
    if kind.classes:
        raise SettingsError(
            f"{KEY}: {path} is {kind.what}; name it in {KEY_OF_CLASS[kind.classes[0]]}"
        )
    if kind.is_llm:
        raise SettingsError(f"{KEY}: {path} is {kind.what}; {kind.advice}")
    return path


@dataclass(frozen=True, kw_only=True)
class InitialWeights:
    """The tensors of a checkpoint that fit a model."""

    path: Path
    source: LazySource
    """The tensors that fit, under the names of the model's table."""
    layers: Mapping[str, tuple[int | None, ...]]
    """By variable: the layers of a stack that the checkpoint has, (None,) if it is no stack."""
    table: Table
    missing: tuple[str, ...]
    """Names of the model that the checkpoint does not have."""
    unused: tuple[str, ...]
    """Names of the checkpoint that the model does not have, or has in another shape."""

    def log(self) -> None:
        """Logs which tensors start from the checkpoint, and which do not."""
        fitting = sum(map(len, self.layers.values()))
        _log.info(
            "%s: %d of %d tensors of the model start from %s; optimizer and schedule start anew",
            *(KEY, fitting, fitting + len(self.missing), self.path),
        )
        if self.missing:
            _log.warning(
                "%s: %s lacks %d tensors, which start from the pretrained components or at "
                "random: %s",
                *(KEY, self.path, len(self.missing), listed(self.missing)),
            )
        if self.unused:
            _log.warning(
                "%s: %d tensors of %s are not used: %s",
                *(KEY, len(self.unused), self.path, listed(self.unused)),
            )

    def load(self, infos: Mapping[str, VariableInfo], place: Place | None) -> Variables:
        """Reads every variable whose layers the checkpoint has all."""
        whole = {
            path: info
            for path, info in infos.items()
            if len(self.layers.get(path, ())) == _count(self._rule(path), info)
        }
        rules = tuple(rule for rule in self.table.rules if rule.target in whole)
        names = {
            n for rule in rules for layer in self.layers[rule.target] for n in rule.accepted(layer)
        }
        source = LazySource(
            {name: info for name, info in self.source.infos.items() if name in names},
            self.source.fetch,
        )
        return mapping.load(source, Table(rules), whole, place)

    def overlay(self, variables: Variables, loaded: Variables) -> Variables:
        """Sets the layers of stacks of which the checkpoint has only some.

        Raises ConversionError if such a stack is quantized.
        """
        partial = {path for path in self.layers if path not in loaded}
        for path in partial:
            if is_quantized(variables[path]):
                raise ConversionError(
                    f"{KEY}: {self.path} has some layers of {path}, which is quantized: it needs "
                    "all of them or none; leave model.quantize_frozen_llm out"
                )
        return {path: self._overlaid(path, variables[path]) for path in partial}

    def _overlaid(self, path: str, value: AnyArray) -> AnyArray:
        rule = self._rule(path)
        out = np.array(value) if isinstance(value, np.ndarray) else value
        for layer in self.layers[path]:
            name = next(n for n in rule.accepted(layer) if n in self.source.infos)
            part = rule.transform.load(self.source.read(name)).astype(out.dtype)
            if isinstance(out, np.ndarray):
                out[layer] = part
            else:
                out = out.at[layer].set(part)
        return out

    def _rule(self, path: str) -> Rule:
        return next(rule for rule in self.table.rules if rule.target == path)


def match(path: Path, table: Table, infos: Mapping[str, VariableInfo]) -> InitialWeights:
    """Finds the tensors of the checkpoint at `path` that fit a model; reads no value of a file.

    Raises ConversionError if none fits, FileNotFoundError for a run without a checkpoint.
    """
    given = _open(path, table, infos)
    stored = {**{name: name for name in given.infos}, **given.aliases}
    by_plain = {_plain(name): kept for name, kept in stored.items()}
    found: dict[str, str] = {}
    layers: dict[str, tuple[int | None, ...]] = {}
    missing: list[str] = []
    for rule in table.rules:
        info = infos[rule.target]
        shape = info.shape[1:] if rule.is_stacked else info.shape
        here: list[int | None] = []
        for layer in range(info.shape[0]) if rule.is_stacked else (None,):
            names = {n: by_plain[_plain(n)] for n in rule.accepted(layer) if _plain(n) in by_plain}
            names = {n: kept for n, kept in names.items() if _fits(rule, given, kept, shape)}
            found |= names
            if names:
                here.append(layer)
            else:
                missing.append(rule.named(rule.source, layer))
        if here:
            layers[rule.target] = tuple(here)
    used = set(found.values())
    unused = [name for name in given.infos if name not in used]
    if not layers:
        raise ConversionError(
            f"{KEY}: none of the {len(given.infos)} tensors of {path} fits the model; the model "
            f"has {listed(missing)}; the checkpoint has {listed(given.infos)}"
        )
    return InitialWeights(
        path=path,
        source=LazySource(
            {name: given.infos[kept] for name, kept in found.items()},
            lambda name, index: given.read(found[name], index),
        ),
        layers=layers,
        table=table,
        missing=tuple(missing),
        unused=tuple(f"{n} {list(given.infos[n].shape)}" for n in unused),
    )


def check(path: Path, table: Table, infos: Mapping[str, VariableInfo]) -> None:
    """Raises ConversionError or SettingsError if `path` holds no weights that fit."""
    if not _is_run(path):
        match(path, table, infos)
    elif not checkpointing.step_folders(path):
        raise SettingsError(f"{KEY}: {path} is a run without a checkpoint")


def _open(path: Path, table: Table, infos: Mapping[str, VariableInfo]) -> LazySource:
    """The tensors of a checkpoint under NeMo's names; those of a run that fit no name by path."""
    if not _is_run(path):
        return open_weights(path)
    variables = dequantized(dict(checkpointing.load_weights(path).variables))
    rules = [
        rule
        for rule in table.rules
        if rule.target in variables and variables[rule.target].shape == infos[rule.target].shape
    ]
    kept = {rule.target: variables[rule.target] for rule in rules}
    rest = variables.keys() - kept.keys()
    others = {path: np.asarray(variables[path]) for path in sorted(rest)}
    return memory_source({**mapping.export(kept, Table(tuple(rules))), **others})


def _is_run(path: Path) -> bool:
    return path.is_dir() and bool(
        (path / checkpointing.CHECKPOINTS).is_dir() or checkpointing.step_folders(path)
    )


def _fits(rule: Rule, given: LazySource, name: str, shape: tuple[int, ...]) -> bool:
    try:
        return rule.transform.info(given.infos[name]).shape == shape
    except ValueError:
        return False


def _count(rule: Rule, info: VariableInfo) -> int:
    return info.shape[0] if rule.is_stacked else 1


def _plain(name: str) -> str:
    for added, plain in PEFT_INFIXES:
        name = name.replace(added, plain)
    return name
