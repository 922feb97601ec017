"""One function for each thing that hasten does."""
