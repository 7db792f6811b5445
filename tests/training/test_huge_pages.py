"""A program on a CPU starts itself again with large memory pages: once, with the same words."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speechlm2_jax.training.run import huge_pages

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys
from pathlib import Path
from speechlm2_jax.training.run import huge_pages
huge_pages.KERNEL, huge_pages.ACCELERATORS = Path(sys.argv[1]), ()
print(os.getpid(), sys.argv[2:], os.environ.get("GLIBC_TUNABLES"), flush=True)
huge_pages.restart_with_huge_pages()
print("done")
"""


@pytest.fixture
def kernel(tmp_path):
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    return file


def run(kernel, *words, **environment):
    kept = {k: v for k, v in os.environ.items() if k != huge_pages.TUNABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(kernel), *words],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_it_starts_again_once_with_the_same_words_as_the_same_process(kernel):
    first, second, last = run(kernel, "--config", "a b")
    pid = first.split()[0]
    assert first == f"{pid} ['--config', 'a b'] None"
    assert second == f"{pid} ['--config', 'a b'] glibc.malloc.hugetlb=1"
    assert last == "done"


def test_other_tunables_are_kept(kernel):
    assert run(kernel, GLIBC_TUNABLES="glibc.malloc.check=0")[1].endswith(
        "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
    )


def test_a_user_can_go_without(kernel):
    assert len(run(kernel, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")) == 2


@pytest.mark.parametrize("text", ["[always] madvise never", "always madvise [never]"])
def test_a_kernel_that_gives_them_anyway_or_never_is_left_alone(kernel, text):
    kernel.write_text(text)
    assert len(run(kernel)) == 2


def test_with_an_accelerator_nothing_happens(kernel, monkeypatch):
    monkeypatch.setattr(huge_pages, "KERNEL", kernel)
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ("null",))  # /dev/null is always there
    monkeypatch.delenv(huge_pages.TUNABLES, raising=False)
    assert not huge_pages._would_help()
    monkeypatch.setattr(huge_pages, "ACCELERATORS", ())
    assert huge_pages._would_help() == sys.platform.startswith("linux")
