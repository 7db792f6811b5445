"""Evaluation of a duplex model: load, generate, score, write manifest, speech and report."""

import contextlib
import tempfile
from pathlib import Path

from speechlm2_jax import models
from speechlm2_jax.evaluation.devices import choose_device
from speechlm2_jax.evaluation.duplex.plan import DuplexPlan
from speechlm2_jax.evaluation.duplex.results import duplex_table
from speechlm2_jax.evaluation.duplex.run import evaluate_duplex, input_keys, open_scorer
from speechlm2_jax.evaluation.provenance import provenance
from speechlm2_jax.evaluation.resuming import open_journal, start_fingerprint
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

    device = choose_device(config.device)
    fingerprint = start_fingerprint(config.pretrained_name)
    with errors_name_key("pretrained_name"):
        model = load_duplex(config.pretrained_name, dtype=config.dtype)
    dataset = plan.dataset(model)
    with contextlib.ExitStack() as stack:
        folder = None if config.audio_folder is None else Path(config.audio_folder)
        if folder is None and page is not None:  # the report embeds the speech
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with errors_name_key("scoring_asr"):
            scorer = open_scorer(model, config, keeps_audio=folder is not None)
        keys, sha256 = input_keys(plan.dialogues), fingerprint.result()
        journal = stack.enter_context(open_journal(output, config, sha256, device, keys))
        result = evaluate_duplex(scorer, plan.dialogues, dataset, config, folder, journal=journal)
        totals = result.totals()
        record = provenance(config, device, totals, sha256=sha256, step=plan.step)
        if journal is not None:
            journal.finish(result.rows(config.use_normalizer), record)
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


def load_duplex(name: str, *, dtype: str) -> DuplexS2SModel:
    """Loads a duplex model of either class. Raises SettingsError for any other model."""
    path = Location().find(name, key="pretrained_name")
    found = registry.identify(path)
    if found is None or found not in registry.DUPLEX_MODELS:
        what = "no duplex model" if found is None else found.what
        raise SettingsError(f"{name} is {what}; a duplex model was expected")
    kind: type[DuplexS2SModel] = getattr(models, found.classes[0])
    return kind.from_pretrained(name, dtype=dtype).eval()
