"""Kinds of data that are knowledge graphs."""
