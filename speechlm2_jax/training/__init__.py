"""Training: schedules, optimizer, the jitted step, the loop, and the user-facing Trainer."""
