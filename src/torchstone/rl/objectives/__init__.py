"""Objectives over what the trained policy itself has written."""
