"""Everything around the training loop: run directory, logs, stopping, summaries."""
