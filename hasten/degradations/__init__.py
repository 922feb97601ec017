"""Degradations that make pairs for training, one file each: `hasten train --degrade "downscale:factor=4"`."""
