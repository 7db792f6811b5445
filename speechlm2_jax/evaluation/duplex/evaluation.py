"""Evaluation of a duplex model: load, generate, score, write manifest, speech and report."""

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from speechlm2_jax import models
from speechlm2_jax.evaluation.devices import (
    batches_of_all,
    choose_devices,
    describe,
    is_joint_mesh,
    no_log,
    placement,
)
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
    print(plan.summary(), flush=True)

    devices = choose_devices(config.device, config.devices)
    fingerprint = start_fingerprint(config.pretrained_name)
    placed = placement(config, devices)
    with errors_name_key("pretrained_name"):
        model = load_duplex(config.pretrained_name, dtype=config.dtype, **placed)
    if placed:
        print(describe(model.mesh), flush=True)
    config = batches_of_all(config, model.mesh)
    device, is_joint = devices[0], is_joint_mesh(model.mesh)
    is_split = jax.process_count() > 1 and not is_joint
    dataset = plan.dataset(model)
    with contextlib.ExitStack() as stack:
        folder = None if config.audio_folder is None else Path(config.audio_folder)
        if folder is None and is_split and page is not None:
            raise SettingsError(
                "audio_folder: several processes need one for the report; name a folder that all "
                "of them share"
            )
        if folder is None and page is not None:  # the report embeds the speech
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        keys, sha256 = input_keys(plan.dialogues), fingerprint.result()
        journals = stack.enter_context(
            Journals(output, config, sha256, device, keys, is_split=is_split)
        )
        log = tqdm.write if jax.process_index() == 0 else no_log

        def run(journal: Journal | None) -> DuplexEvaluation:
            with errors_name_key("scoring_asr"):
                scorer = open_scorer(model, config, keeps_audio=folder is not None)
            given = (scorer, plan.dialogues, dataset, config, folder, log, journal)
            return evaluate_duplex(*given, is_joint=is_joint)

        result = journals.run(run)
        if result is None:
            return
        totals = result.totals()
        record = provenance(config, device, totals, sha256=sha256, step=plan.step)
        if journals.journal is not None:
            journals.journal.finish(result.rows(config.use_normalizer), record)
        print(duplex_table(totals))
        if output is not None:
            print(f"answers: {output}")
        if config.audio_folder is not None:
            print(f"speech:  {config.audio_folder}")
        if page is not None:
            from speechlm2_jax.evaluation.html_report.duplex_page import write_duplex_page

            write_duplex_page(
                *(page, result, plan.dialogues, dataset, record),
                media_rows=config.report_rows,
                normalizer=config.use_normalizer,
            )
            print(f"report:  {page}  (open it in a browser)")


def load_duplex(name: str, *, dtype: str, **placed: Any) -> DuplexS2SModel:
    """Loads a duplex model of either class, as `from_pretrained` does with these arguments.

    Raises SettingsError for any other model.
    """
    path = Location().find(name, key="pretrained_name")
    found = registry.identify(path)
    if found is None or found not in registry.DUPLEX_MODELS:
        what = "no duplex model" if found is None else found.what
        raise SettingsError(f"{name} is {what}; a duplex model was expected")
    kind: type[DuplexS2SModel] = getattr(models, found.classes[0])
    return kind.from_pretrained(name, dtype=dtype, **placed).eval()
