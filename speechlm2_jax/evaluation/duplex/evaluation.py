"""Evaluation of a duplex model: load, generate, score, write manifest, speech and report."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from speechlm2_jax import models
from speechlm2_jax.evaluation.devices import load, show
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.duplex.plan import DuplexPlan
from speechlm2_jax.evaluation.duplex.results import DuplexEvaluation, duplex_table
from speechlm2_jax.evaluation.duplex.run import evaluate_duplex, input_keys, open_scorer
from speechlm2_jax.evaluation.journal import Journal
from speechlm2_jax.evaluation.provenance import provenance
from speechlm2_jax.evaluation.resuming import Journals, start_fingerprint
from speechlm2_jax.models.duplex import DuplexS2SModel
from speechlm2_jax.pretrained import registry
from speechlm2_jax.pretrained.errors import errors_name_key
from speechlm2_jax.pretrained.locate import Location
from speechlm2_jax.settings import SettingsError


def run_duplex_evaluation(plan: DuplexPlan) -> None:
    """Runs the model on each conversation, writes manifest, speech and report, prints scores."""
    config = plan.config
    output, page = plan.output("output_manifest"), plan.output("report")
    show(plan.summary())

    fingerprint = start_fingerprint(config.pretrained_name)
    loaded = load(config, load_duplex)
    dataset = plan.dataset(loaded.model)
    with contextlib.ExitStack() as stack:
        folder = _audio_folder(stack, config, has_page=page is not None, is_split=loaded.is_split)
        keys, sha256 = input_keys(plan.dialogues), fingerprint.result()
        journals = stack.enter_context(Journals(output, loaded, sha256, keys))

        def run(journal: Journal | None) -> DuplexEvaluation:
            with errors_name_key("scoring_asr"):
                scorer = open_scorer(
                    loaded.model,
                    config,
                    keeps_audio=folder is not None or config.benchmark_folder is not None,
                )
            given = (scorer, plan.dialogues, dataset, loaded.config, folder, show, journal)
            return evaluate_duplex(*given, is_joint=loaded.is_joint)

        result = journals.run(run)
        if result is None:
            return
        totals = result.totals()
        record = provenance(config, loaded.device, totals, sha256=sha256, step=plan.step)
        journals.finish(result.rows(config.use_normalizer), record)
        print(duplex_table(totals))
        if output is not None:
            print(f"answers: {output}")
        if config.audio_folder is not None:
            print(f"speech:  {config.audio_folder}")
        if config.benchmark_folder is not None:
            print(f"folders: {config.benchmark_folder}")
        if page is not None:
            from speechlm2_jax.evaluation.html_report.duplex_page import write_duplex_page

            write_duplex_page(
                *(page, result, plan.dialogues, dataset, record),
                media_rows=config.report_rows,
                normalizer=config.use_normalizer,
            )
            print(f"report:  {page}  (open it in a browser)")


def _audio_folder(
    stack: contextlib.ExitStack, config: DuplexEvalConfig, *, has_page: bool, is_split: bool
) -> Path | None:
    """The folder of the agent's speech: a temporary one if only the report needs it."""
    if config.audio_folder is not None:
        return Path(config.audio_folder)
    if not has_page:
        return None
    if is_split:
        raise SettingsError(
            "audio_folder: several processes need one for the report; name a folder that all of "
            "them share"
        )
    return Path(stack.enter_context(tempfile.TemporaryDirectory()))


def load_duplex(name: str, **options: Any) -> DuplexS2SModel:
    """Loads a duplex model of either class, as `from_pretrained` does with these arguments.

    Raises SettingsError for any other model.
    """
    path = Location().find(name, key="pretrained_name")
    found = registry.identify(path)
    if found is None or found not in registry.DUPLEX_MODELS:
        what = "no duplex model" if found is None else found.what
        raise SettingsError(f"{name} is {what}; a duplex model was expected")
    kind: type[DuplexS2SModel] = getattr(models, found.classes[0])
    return kind.from_pretrained(name, **options).eval()
