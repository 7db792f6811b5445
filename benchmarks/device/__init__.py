"""One command that measures the model half on one accelerator: `benchmarks/device.sh`.

- `plan` decides which parts run, for how long at most, and what fits into a device's memory.
- `__main__` runs each part in a process of its own and writes the table and the JSON file.
- `parts` is what such a process does.
- `turns` lets this package and a peer take turns, A B A B, on the same work.

Needs the JAX stack only; the comparison with PyTorch is skipped where torch is not installed.
"""
