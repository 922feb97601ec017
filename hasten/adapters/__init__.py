"""Adapters for other libraries: their models, and libraries that run exported models."""
