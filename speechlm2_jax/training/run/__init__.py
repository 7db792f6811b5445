"""What surrounds the training loop: run directory, logs, stopping, summaries."""
