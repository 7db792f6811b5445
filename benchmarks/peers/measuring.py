"""How the peers time a call; scripts of this folder import it as their neighbour."""

import statistics
import time


def measure(name: str, short: str, call, repeats: int) -> dict[str, object]:
    """[median, fastest, slowest] seconds and the median of the processor's."""
    call()
    seconds, processor = [], []
    for _ in range(repeats):
        started, used = time.perf_counter(), time.process_time()
        call()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {
        f"{name}_s": [statistics.median(seconds), min(seconds), max(seconds)],
        f"{short}_processor_s": statistics.median(processor),
    }
