"""Prints a hash of every program that the project's models compile, or compares with a file.

    python -m tools.program_hashes                    # compare with hashes.json beside this file
    python -m tools.program_hashes --write            # make that file anew
    python -m tools.program_hashes greedy --keep DIR  # one scenario; keep the canonical texts

Each scenario runs a tiny model through the public classes, on one device and on a mesh of eight
forced CPU devices. The programs are recorded where XLA is given them, so the tool knows none of the
functions that made them. Renaming and moving code must keep every hash; a change that alters a
program lands alone, with the reason in its commit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HASHES = Path(__file__).parent / "hashes.json"
LEAST_OPERATIONS = 60
"""Smaller programs are single operations outside of any jit."""
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"


def main(argv: list[str]) -> int:
    """Runs the scenarios; 1 if a hash differs from the file's."""
    arguments = _arguments(argv)
    if arguments.inside:
        Path(arguments.inside).write_text(json.dumps(_lowered(arguments)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "hashes.json"
        command = [sys.executable, "-m", "tools.program_hashes", *argv, "--inside", str(out)]
        code = subprocess.run(command, env={**os.environ, **_environment()}).returncode
        if code:
            return code
        found = json.loads(out.read_text())
    for name, digest in found["programs"].items():
        print(f"{digest}  {name}")
    if arguments.write:
        HASHES.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    return _compare(found, json.loads(HASHES.read_text()), whole=not arguments.scenarios)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.program_hashes",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="all without")
    parser.add_argument("--write", action="store_true", help="write the hashes to the file")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the canonical texts there")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _environment() -> dict[str, str]:
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "HF_HUB_OFFLINE": "1"}


def _lowered(arguments: argparse.Namespace) -> dict[str, object]:
    """Hashes by `scenario, devices, number of the program`."""
    import jax

    from tools.program_hashes.scenarios import ON_ONE_DEVICE, SCENARIOS

    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_include_debug_info_in_dumps", False)
    unknown = set(arguments.scenarios) - set(SCENARIOS)
    if unknown:
        raise SystemExit(f"no such scenario: {', '.join(sorted(unknown))}; {', '.join(SCENARIOS)}")
    programs: dict[str, str] = {}
    for name in arguments.scenarios or SCENARIOS:
        for devices in (1,) if name in ON_ONE_DEVICE else (1, 8):
            print(f"{name} on {devices} device(s)", file=sys.stderr, flush=True)
            programs |= _of_scenario(name, devices, arguments.keep)
    return {"jax": jax.__version__, "programs": programs}


def _of_scenario(name: str, devices: int, keep: Path | None) -> dict[str, str]:
    import jax

    from tools.program_hashes.canonical import canonical
    from tools.program_hashes.scenarios import SCENARIOS

    with tempfile.TemporaryDirectory() as folder:
        dumps, work = Path(folder) / "dumps", Path(folder) / "work"
        dumps.mkdir()
        work.mkdir()
        jax.clear_caches()
        jax.config.update("jax_dump_ir_to", str(dumps))
        try:
            SCENARIOS[name](work, devices)
        finally:
            jax.config.update("jax_dump_ir_to", "")
        texts = [path.read_text() for path in sorted(dumps.glob("*_compile.mlir"))]
    programs = [
        program for program in map(canonical, texts) if program.operations >= LEAST_OPERATIONS
    ]
    found = {}
    for number, program in enumerate(programs, 1):
        label = f"{name}, {devices} device(s), program {number}"
        found[label] = program.digest
        if keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name}.{devices}.{number}.mlir").write_text(program.text)
    return found


def _compare(found: dict, expected: dict, *, whole: bool) -> int:
    if found["jax"] != expected["jax"]:
        print(f"hashes.json is of jax {expected['jax']}, this is {found['jax']}: not compared")
        return 2
    new, old = found["programs"], expected["programs"]
    if not whole:
        chosen = {name.split(",")[0] for name in new}
        old = {name: digest for name, digest in old.items() if name.split(",")[0] in chosen}
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    for name in differing:
        print(f"DIFFERS  {name}: {old.get(name)} -> {new.get(name)}")
    print(f"{len(new) - len(differing)} of {len(new)} programs as in hashes.json")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
