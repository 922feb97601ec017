"""Several processes per run."""
