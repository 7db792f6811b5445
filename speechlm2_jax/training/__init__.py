"""Steps over batches: schedules, optimizer, the jitted step, and the loop that a user starts."""
