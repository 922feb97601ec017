"""How each bundled model and headline figure was made: one typed function a file."""
