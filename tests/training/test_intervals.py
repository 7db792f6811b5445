"""When steps, validations and the end fall, as in Lightning."""

import pytest

from speechlm2_jax.training.intervals import resolve_validation_interval
from speechlm2_jax.training.trainer_config import TrainerConfig


def simulate(batches=60, **options):
    """Runs a intervals: (windows, micro-batch counts after which it validated, steps)."""
    intervals = TrainerConfig(**{"max_steps": 1000, **options}).intervals()
    done, steps, windows, validated = 0, 0, [], []
    while done < batches and not intervals.is_finished(steps, done):
        window = intervals.window(done)
        windows.append(window)
        if intervals.validates_after(done, done + window):
            validated.append(done + window)
        done, steps = done + window, steps + 1
    return windows, validated, steps


def test_integers_count_micro_batches_within_an_epoch():
    _, validated, _ = simulate(limit_train_batches=20, val_check_interval=8)
    assert validated == [8, 16, 28, 36, 48, 56]  # starts again in each epoch


def test_across_epochs_when_no_epoch_is_named():
    _, validated, _ = simulate(
        limit_train_batches=20, val_check_interval=25, check_val_every_n_epoch=None
    )
    assert validated == [25, 50]


def test_a_float_is_a_part_of_an_epoch():
    assert simulate(limit_train_batches=20, val_check_interval=0.25)[1][:4] == [5, 10, 15, 20]
    assert simulate(limit_train_batches=20)[1] == [20, 40, 60]


def test_only_every_nth_epoch_validates():
    assert simulate(limit_train_batches=10, check_val_every_n_epoch=2)[1] == [20, 40, 60]


def test_an_endless_epoch_validates_by_count_or_not_at_all():
    assert simulate(val_check_interval=20)[1] == [20, 40, 60]
    assert simulate()[1] == []


def test_an_epoch_ends_its_accumulation():
    windows, validated, _ = simulate(
        batches=14, limit_train_batches=7, accumulate_grad_batches=3, val_check_interval=4
    )
    assert windows == [3, 3, 1, 3, 3, 1]
    assert validated == [6, 13]  # after the step that holds micro-batch 4 of the epoch


def test_the_end_is_the_first_limit_reached():
    assert simulate(max_steps=5)[2] == 5
    assert simulate(max_steps=-1, max_epochs=2, limit_train_batches=7)[2] == 14
    assert simulate(max_steps=9, max_epochs=2, limit_train_batches=7)[2] == 9


@pytest.mark.parametrize("interval", [0.0, 1.5, -0.1])
def test_a_part_of_an_epoch_lies_between_zero_and_one(interval):
    with pytest.raises(ValueError, match="val_check_interval"):
        resolve_validation_interval(interval, 10, across_epochs=False)
