"""Helpers of several packages."""
