"""A toy run of several processes, slow enough to be disturbed: toy_processes.py RUN_DIR STEPS."""

import sys
import time

from speechlm2_jax.processes import exit_on_error, initialize
from speechlm2_jax.training.run.finishing import exit_code
from tests.training.toy import ToyData, ToyModel, make_trainer

PAUSE_S = 0.05
WATCHDOG_S = 40.0
"""A step may take many seconds on a machine that does other work too."""
SAVED_EVERY, VALIDATED_EVERY = 3, 10


def main(run_dir: str, steps: str) -> int:
    """Trains; the exit code."""
    with exit_on_error():
        initialize()
        trainer = make_trainer(
            run_dir,
            max_steps=int(steps),
            limit_train_batches=VALIDATED_EVERY,
            devices=-1,
            strategy={"_target_": "FSDPStrategy"},
            watchdog_s=WATCHDOG_S,
            experiment={
                "checkpoint_callback_params": {
                    "monitor": "val_loss",
                    "save_top_k": 1,
                    "every_n_train_steps": SAVED_EVERY,
                }
            },
        )
        data = ToyData(on_batch=lambda _: time.sleep(PAUSE_S))
        result = trainer.fit(ToyModel(dropout=0.2), data)
    return exit_code(result)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
