#!/usr/bin/env bash
# Measures the model half on one accelerator within 9 minutes; --tiny does all of it on a CPU.
# Needs Python >= 3.11 and the JAX stack (jax, flax, optax, transformers); no network.
#   PYTHON=...        the interpreter; by default python3 or python, whichever has jax
#   PEER_PYTHON=...   the interpreter of the PyTorch peer, by default the same
#   OUT=...           where device_results.json goes, by default the current folder
set -euo pipefail

for python in ${PYTHON:-python3 python}; do
    "$python" -c 'import jax' 2>/dev/null && found=$python && break
done
if [ -z "${found:-}" ]; then
    echo "no Python with jax among: ${PYTHON:-python3 python}; set PYTHON=/path/to/python" >&2
    exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
command -v nvidia-smi >/dev/null && nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader >&2 || true
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$found" -m benchmarks.device "$@"
