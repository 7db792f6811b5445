"""Writes a model in another format, opens what was written, and compares both: `convert.py`."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speechlm2_jax import models
from speechlm2_jax.conversion import hf_config, mapping
from speechlm2_jax.conversion.casting import cast_source, main_dtype
from speechlm2_jax.conversion.decoder import decoder_table
from speechlm2_jax.conversion.errors import ConversionError, SelfTestError
from speechlm2_jax.conversion.listing import lines
from speechlm2_jax.conversion.readers import TensorSource, open_weights, read_json
from speechlm2_jax.conversion.repacking import NEMO_SUFFIX, repack, weights_path
from speechlm2_jax.inference.probe import Difference, Outputs, compare, probe_llm
from speechlm2_jax.layers.module import abstract, describe
from speechlm2_jax.llm.decoder import Decoder
from speechlm2_jax.models.exportable import Exportable
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.llm_files import llm_config, llm_weights
from speechlm2_jax.pretrained.locate import Location


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What the target shall be."""

    format: str | None = None
    """Of a speech model: "nemo", the default, or "hf", its LLM alone."""
    merge_lora: bool | None = None
    """Whether LoRA becomes part of the weights; by default only for "hf"."""
    dtype: str | None = None
    """Dtype of every floating tensor; None keeps each as it is."""
    has_self_test: bool = True
    """Whether the target is opened again and compared with the source."""

    @property
    def merges(self) -> bool:
        """Whether LoRA is merged."""
        return self.format == "hf" if self.merge_lora is None else self.merge_lora


def export(source: Path, target: Path, options: ExportOptions) -> Iterator[str]:
    """Writes `source` to `target`; yields the lines of the report as they are known.

    Raises ConversionError or SettingsError for what cannot be converted, SelfTestError if the
    target does not compute what the source does.
    """
    kind = registry.identify(source) if source.exists() else None
    if kind is None and (source / registry.CONFIG).is_file():
        read_json(source / registry.CONFIG)  # a damaged one is refused by name
    name = kind.classes[0] if kind is not None and kind.classes else ""
    is_llm = kind is not None and kind.is_llm
    if name in registry.SPEECH_MODELS:
        yield from _export_speech_model(name, source, target, options)
        return
    if options.format == "hf" and not is_llm:
        raise ConversionError(f"{source} has no LLM, which --to hf writes; leave --to out")
    if options.merge_lora is not None:
        raise ConversionError(f"{source} is not a speech model; leave --merge-lora out")
    if name and registry.is_run(source):
        yield from _export_ctc_run(source, target, options)
    else:
        yield from _export_tensors(source, target, options, is_llm=is_llm)


def _export_speech_model(
    name: str, source: Path, target: Path, options: ExportOptions
) -> Iterator[str]:
    """Writes a whole speech model, or its LLM alone."""
    if target.suffix == NEMO_SUFFIX:
        raise ConversionError(f"{target}: NeMo keeps speech LLMs as directories; name one")
    kind, is_llm = getattr(models, name), options.format == "hf"
    model: Exportable = kind.from_pretrained(source)
    yield from _loaded(source, model)
    expected: Outputs = {}
    if options.has_self_test:
        expected = model.probe_llm(with_lora=options.merges) if is_llm else model.probe()
    write = model.save_llm if is_llm else model.save_pretrained
    write(target, merge_lora=options.merges, dtype=options.dtype)
    if is_llm:
        others = {path.partition(".")[0] for path in model.infos} - {"llm"}
        yield f"not part of the LLM, so not written: {', '.join(sorted(others))}"
    yield from _written(target)
    rounded_to = options.dtype or (main_dtype(open_weights(target)) if options.merges else None)
    del model, write  # the written model takes the memory of the source
    if options.has_self_test:
        found = _probe_llm_directory(target) if is_llm else kind.from_pretrained(target).probe()
        yield _judged(target, compare(expected, found, rounded_to))


def _export_ctc_run(source: Path, target: Path, options: ExportOptions) -> Iterator[str]:
    """Writes the run of a CTC model as a .nemo file."""
    if target.suffix != NEMO_SUFFIX:
        raise ConversionError(f"{target}: a CTC model is a .nemo file; name one")
    model = models.CTCModel.from_pretrained(source)
    yield f"loaded: {len(model.infos)} of {len(model.infos)} variables"
    expected = model.probe() if options.has_self_test else {}
    model.save_to(target, dtype=options.dtype)
    yield from _written(target)
    del model
    if options.has_self_test:
        found = models.CTCModel.from_pretrained(target).probe()
        yield _judged(target, compare(expected, found, options.dtype))


def _export_tensors(
    source: Path, target: Path, options: ExportOptions, *, is_llm: bool
) -> Iterator[str]:
    """Writes tensors under their own names; of an LLM also compares the logits."""
    repack(source, target, options.dtype)
    given = llm_weights(source) if is_llm else open_weights(source)
    yield f"loaded: {len(given.infos)} of {len(given.infos)} tensors"
    yield from _written(target)
    if not options.has_self_test:
        return
    written = open_weights(weights_path(target))
    if given.infos.keys() == written.infos.keys():
        _check_same(target, cast_source(given, options.dtype), written)
        yield "self-test: every tensor reads back as it was written"
    if is_llm:
        try:
            expected = _probe_llm_directory(source)
        except ConversionError as error:  # weights of any architecture can be written
            yield f"self-test: the LLM was not run: {error}"
            return
        found = _probe_llm_directory(target)
        yield _judged(target, compare(expected, found, options.dtype))


def _loaded(source: Path, model: Exportable) -> list[str]:
    """What was loaded of a speech model's checkpoint."""
    path = Location().find(str(source), key="SOURCE")
    if registry.is_run(path):  # every variable is restored, or it is an error
        return [f"loaded: {len(model.infos)} of {len(model.infos)} variables"]
    return model.coverage(path).lines()


def _written(target: Path) -> Iterator[str]:
    """What was written, and the tensors whose values deserve a look."""
    path = weights_path(target)
    written = open_weights(path)
    sizes = sum(info.size_bytes for info in written.infos.values())
    dtypes = Counter(str(info.dtype) for info in written.infos.values())
    counts = ", ".join(f"{count} {dtype}" for dtype, count in sorted(dtypes.items()))
    yield f"{path}: {len(written.infos)} tensors, {sizes} bytes ({counts})"
    for line in filter(lambda line: line.is_suspect, lines(written)):
        yield f"look at {line.name}: {line.note}"


def _probe_llm_directory(directory: Path) -> Outputs:
    """The logits of a Hugging Face directory or a GGUF file."""
    config = hf_config.decoder_config(llm_config(directory, key="config.json of the LLM"))
    infos = describe(abstract(lambda rngs: Decoder(config, rngs=rngs)))
    variables = mapping.load(llm_weights(directory), decoder_table(config), infos)
    return probe_llm(config, variables)


def _check_same(target: Path, expected: TensorSource, found: TensorSource) -> None:
    """Raises SelfTestError if a tensor does not read back as it was written."""
    for name in expected.infos:
        if expected.read(name).tobytes() != found.read(name).tobytes():
            raise SelfTestError(f"self-test failed: {name} in {target} differs from its source")


def _judged(target: Path, difference: Difference) -> str:
    """The line of the report. Raises SelfTestError if the difference is not small."""
    if not difference.is_small:
        raise SelfTestError(
            f"self-test failed: {target} does not compute what its source does: "
            f"{difference.summary()}; do not use it"
        )
    return f"self-test: {difference.summary()}"
