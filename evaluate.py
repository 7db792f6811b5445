"""Answers recordings with a speech model and scores the answers.

python evaluate.py                the newest run below runs/, on the bundled test set
python evaluate.py pretrained_name=runs/digits inputs=test.jsonl batch_size=16 [key=value ...]
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from speechlm2_jax import settings
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.encoder_wer import Recogniser, open_recogniser
from speechlm2_jax.evaluation.plan import Plan, make_plan


def main(argv: Sequence[str], *, compiled: str | None = None) -> int:
    """Runs an evaluation; 2 after one line on what is wrong with the input, if anything is.

    `compiled` is where compiled programs are kept between runs; auto is the user's cache.
    """
    try:
        run(parse(argv), compiled)
    except settings.SettingsError as error:
        print("evaluate.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


def parse(argv: Sequence[str]) -> Plan:
    """The command line as a checked configuration, completed by what the newest run says."""
    keys = [field.name for field in dataclasses.fields(EvalConfig)]
    words = settings.parse_overrides(
        argv, program="evaluate.py", description=__doc__ or "", keys=keys
    )
    return make_plan(settings.override({}, [f"+{word.lstrip('+')}" for word in words]))


def run(plan: Plan, compiled: str | None) -> None:
    """Reads the inputs, answers them, writes rows and page, prints the table."""
    # cheap checks come before any weight is read
    config = plan.config
    utterances = plan.utterances()
    output, page = plan.output("output_manifest"), plan.output("report")
    print(plan.says(), flush=True)

    from speechlm2_jax.evaluation.devices import choose_device
    from speechlm2_jax.evaluation.encoder_wer import encoder_texts
    from speechlm2_jax.evaluation.page import write_page
    from speechlm2_jax.evaluation.provenance import provenance
    from speechlm2_jax.evaluation.report import table, write_rows
    from speechlm2_jax.evaluation.runner import evaluate
    from speechlm2_jax.models import SALM
    from speechlm2_jax.models.generation_config import read_request
    from speechlm2_jax.training.programs import keep_compiled_programs

    keep_compiled_programs(compiled)
    device = choose_device(config.device)
    with _clear("pretrained_name"):
        model = SALM.from_pretrained(config.pretrained_name, dtype=config.dtype).eval()
    if config.generation:
        with _clear("generation"):  # ids that this vocabulary lacks
            read_request(model, config.generation)
    recogniser = _recogniser(plan)
    result = evaluate(model, utterances, config)
    if recogniser is not None:
        texts = encoder_texts(recogniser, utterances, config.batch_size)
        result = result.with_encoder_texts(texts)
    totals = result.totals()
    record = provenance(config, device, totals, plan.step)
    print(table(totals))
    if output is not None:
        write_rows(output, result.rows(), record)
        print(f"answers: {output}")
    if page is not None:
        rate_hz = model.sampling_rate
        write_page(page, result, utterances, record, media_rows=config.report_rows, rate_hz=rate_hz)
        print(f"report:  {page}  (open it in a browser)")


def _recogniser(plan: Plan) -> Recogniser | None:
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
    sys.exit(main(sys.argv[1:], compiled="auto"))
