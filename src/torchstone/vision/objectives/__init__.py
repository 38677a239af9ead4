"""Objectives over pictures without labels."""
