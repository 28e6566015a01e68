"""Training: losses, optimiser, schedules, the compiled step, the loop."""
