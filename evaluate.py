"""Answers recordings with a speech model and scores the answers.

python evaluate.py pretrained_name=runs/digits inputs=test.jsonl batch_size=16 [key=value ...]
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from speechlm2_jax import settings
from speechlm2_jax.evaluation.config import EvalConfig


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


def parse(argv: Sequence[str]) -> EvalConfig:
    """The command line as a checked configuration."""
    keys = [field.name for field in dataclasses.fields(EvalConfig)]
    words = settings.parse_overrides(
        argv, program="evaluate.py", description=__doc__ or "", keys=keys
    )
    values = settings.override({}, [f"+{word.lstrip('+')}" for word in words])
    return settings.build(EvalConfig, values)


def run(config: EvalConfig, compiled: str | None) -> None:
    """Reads the inputs, answers them, writes the rows, prints the table."""
    from speechlm2_jax.evaluation.inputs import read_inputs

    # cheap checks come before any weight is read
    utterances = read_inputs(config.inputs)
    output = None if config.output_manifest is None else Path(config.output_manifest)
    if output is not None and output.is_dir():
        raise settings.SettingsError(f"output_manifest: {output} is a folder; name a file")

    from speechlm2_jax.evaluation.devices import choose_device
    from speechlm2_jax.evaluation.provenance import provenance
    from speechlm2_jax.evaluation.report import table, write_rows
    from speechlm2_jax.evaluation.runner import evaluate
    from speechlm2_jax.experiment import USER_ERRORS
    from speechlm2_jax.models import SALM
    from speechlm2_jax.training.programs import keep_compiled_programs

    keep_compiled_programs(compiled)
    device = choose_device(config.device)
    try:
        model = SALM.from_pretrained(config.pretrained_name, dtype=config.dtype).eval()
    except settings.SettingsError:
        raise
    except (*USER_ERRORS, OSError) as error:
        raise settings.SettingsError(f"pretrained_name: {error}") from error
    result = evaluate(model, utterances, config)
    totals = result.totals()
    if output is not None:
        write_rows(output, result.rows(), provenance(config, device, totals))
    print(table(totals))
    if output is not None:
        print(f"answers: {output}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], compiled="auto"))
