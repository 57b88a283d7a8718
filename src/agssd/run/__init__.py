"""What a run is on disk and to its machine: directory, state, checkpoints, signals, SLURM, loggers."""
