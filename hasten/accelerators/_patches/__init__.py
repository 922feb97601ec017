"""Layers that work on a patch of an image and exchange borders and context with other processes."""
