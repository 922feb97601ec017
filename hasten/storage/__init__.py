"""Models, weights and finished batches on disk."""
