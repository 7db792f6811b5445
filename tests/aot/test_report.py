"""What a program costs: sums, times over the chip's peaks, and the verdict."""

import json
from dataclasses import replace

import pytest

from speechlm2_jax.aot.chips import CHIPS, read_topology
from speechlm2_jax.aot.collectives import Collective
from speechlm2_jax.aot.report import Report
from speechlm2_jax.settings import SettingsError

GIB = 2**30
REPORT = Report(
    program="a training step",
    topology="v5e:4x4",
    mesh="fsdp 16",
    shape="16 groups",
    memory={"trained parameters": 3 * GIB, "scratch": 4 * GIB},
    chip=CHIPS["v5e"],
    flops_per_s=197e12,
    flops=197e12 / 2,
    read_bytes=0.0,
    collectives=(Collective(kind="all-gather", count=28, bytes_sent=20_000_000_000),),
    compiled_in_s=60.0,
)


def test_least_times_are_those_of_arithmetic_and_traffic():
    assert REPORT.compute_s == pytest.approx(0.5)
    assert REPORT.traffic_s == pytest.approx(0.1)
    assert REPORT.step_s == pytest.approx((0.5, 0.6))
    reading = replace(REPORT, flops=0.0, read_bytes=819e9)
    assert reading.compute_s == pytest.approx(1.0)


def test_what_is_larger_than_the_chip_does_not_fit():
    assert REPORT.fits and "fits" in REPORT.table()
    larger = replace(REPORT, memory={"scratch": 17 * GIB})
    assert not larger.fits and "DOES NOT FIT" in larger.table()


def test_table_and_json_tell_the_same():
    table, values = REPORT.table(), json.loads(REPORT.to_json())
    assert "7.00 GiB of 16.00 GiB" in table and "28 x, 18.63 GiB sent" in table
    assert values["total_bytes"] == 7 * GIB and values["fits"] is True
    assert values["collectives"] == [
        {"kind": "all-gather", "count": 28, "bytes_sent": 20_000_000_000}
    ]


@pytest.mark.parametrize("name", ["v9:4x4", "v5e", "v5e:4", "v5e:4x4x4x4"])
def test_a_topology_that_is_none_is_refused_with_those_that_are(name):
    with pytest.raises(SettingsError, match="give a chip and the shape of its mesh"):
        read_topology(name)


def test_without_libtpu_the_command_that_fetches_it_is_named(tmp_path):
    with pytest.raises(SettingsError, match="python -m speechlm2_jax.aot.fetch --to"):
        read_topology("v5e:4x4", tmp_path)
