"""Evaluates a speech model: generates a response to every recording and scores the responses.

python evaluate.py                the newest run below runs/, on the bundled test set
python evaluate.py pretrained_name=runs/digits inputs=test.jsonl batch_size=16 [key=value ...]
python evaluate.py pretrained_name=runs/s2s_duplex       a duplex model, on its validation sets
python -m speechlm2_jax.launch -n 2 evaluate.py ...      two processes; SLURM's are found without it
"""

from speechlm2_jax.usage import print_help_if_asked

if __name__ == "__main__":  # before the imports below, which are slow
    print_help_if_asked(
        __file__,
        keys_of=[f"speechlm2_jax/evaluation/{name}config.py" for name in ("", "duplex/")],
    )

import sys
from collections.abc import Sequence

from speechlm2_jax import console, processes
from speechlm2_jax.compilation_cache import keep_compiled_programs
from speechlm2_jax.evaluation.arguments import parse_arguments
from speechlm2_jax.evaluation.duplex.evaluation import run_duplex_evaluation
from speechlm2_jax.evaluation.duplex.plan import DuplexPlan
from speechlm2_jax.evaluation.exit_codes import exit_code
from speechlm2_jax.evaluation.salm_evaluation import run_salm_evaluation


def main(argv: Sequence[str], *, compiled: str | None = None) -> int:
    """Runs an evaluation and returns its exit code.

    Bad input is one line and exit code 2. Ctrl-C and SIGTERM end the evaluation with one line and
    128 + the signal; the responses generated so far are kept. `compiled` is the folder of the
    persistent compilation cache; "auto" is the user's cache folder.
    """
    with processes.exit_on_error():
        code = exit_code("evaluate.py", lambda: _evaluate(argv, compiled))
        if code and processes.are_several():
            raise SystemExit(code)
    return code


def _evaluate(argv: Sequence[str], compiled: str | None) -> None:
    plan = parse_arguments(argv, description=__doc__ or "")
    processes.initialize(plan.config.num_nodes)
    keep_compiled_programs(compiled)
    if isinstance(plan, DuplexPlan):
        run_duplex_evaluation(plan)
    else:
        run_salm_evaluation(plan)


if __name__ == "__main__":
    console.ignore_closed_pipes()
    sys.exit(main(sys.argv[1:], compiled="auto"))
