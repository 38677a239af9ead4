"""Objectives that make a smaller model of a larger one."""
