"""Benchmarks: one command per table, each ending in one line of JSON.

    python -m benchmarks.salm --preset small          training step and generation of a shape
    python -m benchmarks.duplex --preset tiny         the same of a full-duplex model
    python -m benchmarks.perception --preset small    mel features and encoder alone
    python -m benchmarks.loader                       batches per second of the data loader
    python -m benchmarks.startup                      seconds to the first step and first response
    benchmarks/device.sh                              an accelerator within 9 minutes
    python -m benchmarks.side_by_side OURS --against THEIRS

They run from the repository's root; all but `loader` and `startup` need the JAX stack only.
"""
