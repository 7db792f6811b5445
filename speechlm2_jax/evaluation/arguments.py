"""The command line of evaluate.py -> an evaluation plan."""

import dataclasses
from collections.abc import Sequence

from speechlm2_jax import settings
from speechlm2_jax.evaluation.config import EvalConfig
from speechlm2_jax.evaluation.duplex.config import DuplexEvalConfig
from speechlm2_jax.evaluation.duplex.plan import MODEL, DuplexPlan, find_model, make_duplex_plan
from speechlm2_jax.evaluation.plan import EvaluationPlan, make_plan
from speechlm2_jax.object_store.copies import fetch_run
from speechlm2_jax.object_store.folders import is_address


def parse_arguments(
    argv: Sequence[str], *, description: str, program: str = "evaluate.py"
) -> EvaluationPlan | DuplexPlan:
    """Checks `key=value` arguments and fills in defaults from the run that is evaluated.

    `description` is the text of --help. Raises SettingsError for bad arguments or inputs.
    """
    configs = (EvalConfig, DuplexEvalConfig)
    keys = dict.fromkeys(field.name for config in configs for field in dataclasses.fields(config))
    overrides = settings.parse_overrides(
        argv, program=program, description=description, keys=list(keys)
    )
    arguments = settings.override({}, [f"+{text.lstrip('+')}" for text in overrides])
    name = str(arguments.get(MODEL, ""))
    if is_address(name):
        arguments = {**arguments, MODEL: str(fetch_run(name))}
    found = find_model(arguments)
    return make_duplex_plan(arguments, found) if found.is_duplex else make_plan(arguments)
