"""A run's folder: its frozen samples and their order, settings, checkpoints and metrics."""
