"""Evaluates a speech model: generates a response to every recording and scores the responses.

python evaluate.py                the newest run below runs/, on the bundled test set
python evaluate.py pretrained_name=runs/digits inputs=test.jsonl batch_size=16 [key=value ...]
python evaluate.py pretrained_name=runs/s2s_duplex       a duplex model, on its validation sets
python evaluate.py --compare A B --metrics wer,cer       two output manifests: is the change luck?
python -m speechlm2_jax.launch -n 2 evaluate.py ...      two processes; SLURM's are found without it
"""

from collections.abc import Sequence

from speechlm2_jax import console
from speechlm2_jax.usage import print_help_if_asked

PROGRAM = "evaluate.py"
COMPARE = "--compare"
KEYS_OF = tuple(f"../evaluation/{name}config.py" for name in ("", "duplex/"))


def run(argv: Sequence[str], *, program: str = PROGRAM) -> int:
    """Evaluates with the user's cache of compiled programs; see `main`."""
    print_help_if_asked(
        __file__, keys_of=KEYS_OF, keys_page="evaluation.md", argv=argv, program=program
    )
    console.ignore_closed_pipes()
    return main(argv, compiled="auto", program=program)


def main(argv: Sequence[str], *, compiled: str | None = None, program: str = PROGRAM) -> int:
    """Runs an evaluation and returns its exit code.

    Bad input is one line and exit code 2. Ctrl-C and SIGTERM end the evaluation with one line and
    128 + the signal; the responses generated so far are kept. `compiled` is the folder of the
    persistent compilation cache; "auto" is the user's cache folder.
    """
    from speechlm2_jax import processes
    from speechlm2_jax.evaluation.exit_codes import exit_code

    with processes.exit_on_error():
        code = exit_code(program, lambda: _evaluate(argv, compiled, program))
        if code and processes.are_several():
            raise SystemExit(code)
    return code


def _evaluate(argv: Sequence[str], compiled: str | None, program: str) -> None:
    if COMPARE in argv:
        from speechlm2_jax.evaluation.compare import compare_responses

        print(compare_responses(argv, program))
        return
    from speechlm2_jax import processes
    from speechlm2_jax.compilation_cache import keep_compiled_programs
    from speechlm2_jax.evaluation.arguments import parse_arguments
    from speechlm2_jax.evaluation.duplex.evaluation import run_duplex_evaluation
    from speechlm2_jax.evaluation.duplex.plan import DuplexPlan
    from speechlm2_jax.evaluation.salm_evaluation import run_salm_evaluation

    plan = parse_arguments(argv, description=__doc__ or "", program=program)
    processes.initialize(plan.config.num_nodes)
    keep_compiled_programs(compiled)
    if isinstance(plan, DuplexPlan):
        run_duplex_evaluation(plan)
    else:
        run_salm_evaluation(plan)
