"""Attacks on trained classifiers, and what they leave to be trusted."""
