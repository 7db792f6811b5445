"""Answers recordings with a speech model and scores the answers.

python evaluate.py                the newest run below runs/, on the bundled test set
python evaluate.py pretrained_name=runs/digits inputs=test.jsonl batch_size=16 [key=value ...]
python evaluate.py pretrained_name=runs/s2s_duplex       a duplex model, on its validation sets
"""

from speechlm2_jax.usage import answer_help

if __name__ == "__main__":  # before the imports below, which are slow
    answer_help(
        __file__,
        keys_of=[f"speechlm2_jax/evaluation/{name}config.py" for name in ("", "duplex/")],
    )

import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from speechlm2_jax import console, settings
from speechlm2_jax.evaluation.config import EvalConfig, check_generation
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.duplex.plan import DuplexPlan, find_model, make_duplex_plan
from speechlm2_jax.evaluation.encoder_wer import EncoderTranscriber, open_recogniser
from speechlm2_jax.evaluation.interruption import interruptible, notes, report_interruption
from speechlm2_jax.evaluation.plan import EvaluationPlan, make_plan


def main(argv: Sequence[str], *, compiled: str | None = None) -> int:
    """Runs an evaluation; 2 after one line on what is wrong with the input, if anything is.

    Ctrl-C and SIGTERM end it with one line, too; what is answered by then is kept.
    `compiled` is where compiled programs are kept between runs; auto is the user's cache.
    """
    try:
        with interruptible():
            plan = parse(argv)
            if isinstance(plan, DuplexPlan):
                run_duplex(plan, compiled)
            else:
                run(plan, compiled)
    except settings.SettingsError as error:
        line = "; ".join(filter(None, [str(error), notes(error)]))
        print("evaluate.py:", " ".join(line.split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        return report_interruption("evaluate.py", error)
    return 0


def parse(argv: Sequence[str]) -> EvaluationPlan | DuplexPlan:
    """The command line as a checked configuration, completed by what the newest run says."""
    kinds = (EvalConfig, DuplexEvalConfig)
    keys = dict.fromkeys(field.name for kind in kinds for field in dataclasses.fields(kind))
    given = settings.parse_overrides(
        argv, program="evaluate.py", description=__doc__ or "", keys=list(keys)
    )
    words = settings.override({}, [f"+{word.lstrip('+')}" for word in given])
    found = find_model(words)
    return make_duplex_plan(words, found) if found.is_duplex else make_plan(words)


def run(plan: EvaluationPlan, compiled: str | None) -> None:
    """Reads the inputs, answers them, writes rows and page, prints the table."""
    # cheap checks come before any weight is read
    config = plan.config
    utterances = plan.utterances()
    output, page = plan.output("output_manifest"), plan.output("report")
    print(plan.says(), flush=True)

    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.evaluation.devices import choose_device
    from speechlm2_jax.evaluation.encoder_wer import encoder_texts
    from speechlm2_jax.evaluation.html_report.page import write_page
    from speechlm2_jax.evaluation.provenance import provenance
    from speechlm2_jax.evaluation.results import table
    from speechlm2_jax.evaluation.resuming import open_journal, start_fingerprint
    from speechlm2_jax.evaluation.run import evaluate, input_keys
    from speechlm2_jax.models import SALM

    keep_compiled_programs(compiled)
    device = choose_device(config.device)
    weights = start_fingerprint(config.pretrained_name)
    with _clear("pretrained_name"):
        model = SALM.from_pretrained(config.pretrained_name, dtype=config.dtype).eval()
    if config.generation:  # ids that this vocabulary lacks
        check_generation(config.generation, config.max_new_tokens, model)
    recogniser = _recogniser(plan)
    keys, sha256 = input_keys(utterances), weights.result()
    with open_journal(output, config, sha256, device, keys) as journal:
        result = evaluate(model, utterances, config, journal=journal)
        if recogniser is not None:
            texts = encoder_texts(recogniser, utterances, config.batch_size, config.max_audio_s)
            result = result.with_encoder_texts(texts)
        totals = result.totals()
        record = provenance(config, device, totals, sha256=sha256, step=plan.step)
        if journal is not None:
            journal.finish(result.rows(), record)
        print(table(totals))
        if output is not None:
            print(f"answers: {output}")
    if page is not None:
        rate_hz = model.sampling_rate
        write_page(page, result, utterances, record, media_rows=config.report_rows, rate_hz=rate_hz)
        print(f"report:  {page}  (open it in a browser)")


def run_duplex(plan: DuplexPlan, compiled: str | None) -> None:
    """The same for a model that speaks: its speech is written, heard and timed too."""
    config = plan.config
    output, page = plan.output("output_manifest"), plan.output("report")
    print(plan.says(), flush=True)

    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.evaluation.devices import choose_device
    from speechlm2_jax.evaluation.duplex.results import duplex_table
    from speechlm2_jax.evaluation.duplex.run import converse, input_keys, open_scorer
    from speechlm2_jax.evaluation.html_report.duplex_page import write_duplex_page
    from speechlm2_jax.evaluation.provenance import provenance
    from speechlm2_jax.evaluation.resuming import open_journal, start_fingerprint
    from speechlm2_jax.experiment import load_duplex

    keep_compiled_programs(compiled)
    device = choose_device(config.device)
    weights = start_fingerprint(config.pretrained_name)
    with _clear("pretrained_name"):
        model = load_duplex(config.pretrained_name, dtype=config.dtype)
    dataset = plan.dataset(model)
    with contextlib.ExitStack() as stack:
        folder = None if config.audio_folder is None else Path(config.audio_folder)
        if folder is None and page is not None:  # the page has its own copy
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with _clear("scoring_asr"):
            scorer = open_scorer(model, config, keeps_audio=folder is not None)
        keys, sha256 = input_keys(plan.dialogues), weights.result()
        journal = stack.enter_context(open_journal(output, config, sha256, device, keys))
        result = converse(scorer, plan.dialogues, dataset, config, folder, journal=journal)
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
            write_duplex_page(
                *(page, result, plan.dialogues, dataset, record),
                media_rows=config.report_rows,
                normalizer=config.use_normalizer,
            )
            print(f"report:  {page}  (open it in a browser)")


def _recogniser(plan: EvaluationPlan) -> EncoderTranscriber | None:
    """The encoder's own CTC head, if it is to be scored; only a head that was asked for must be."""
    if plan.encoder_file is None:
        return None
    try:
        with _clear("encoder_wer"):
            return open_recogniser(plan.encoder_file)
    except settings.SettingsError as error:
        if "encoder_wer" in plan.given:
            raise
        print(f"note   {error}")
        return None


@contextmanager
def _clear(key: str) -> Iterator[None]:
    """Turns what a user can mend into a SettingsError that names the key."""
    from speechlm2_jax.experiment import USER_ERRORS

    try:
        yield
    except settings.SettingsError:
        raise
    except (*USER_ERRORS, OSError) as error:
        raise settings.SettingsError(f"{key}: {error}") from error


if __name__ == "__main__":
    console.outlive_readers()
    sys.exit(main(sys.argv[1:], compiled="auto"))
