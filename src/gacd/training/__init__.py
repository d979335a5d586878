"""One loop for every method: schedules, averages, validation, checkpoints, resuming."""
