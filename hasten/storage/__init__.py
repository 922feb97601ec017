"""Models, plans, batches of images and provenance on disk."""
