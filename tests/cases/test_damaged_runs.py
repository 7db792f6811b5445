"""A tiny SALM's run, damaged and killed, through the programs (`damaged_runs` is the long form)."""

import pytest

from tests.cases import damaged_runs


@pytest.mark.slow
def test_flipped_bits_are_never_silently_wrong(tmp_path):
    assert damaged_runs.flips(20, 0, tmp_path) == []


@pytest.mark.slow
def test_killed_runs_end_with_the_same_losses(tmp_path):
    assert damaged_runs.kills(4, 0, tmp_path, steps=300) == []
