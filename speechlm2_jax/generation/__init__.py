"""Generation: decoding loops, sampling and score processors."""
