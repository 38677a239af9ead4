"""Objectives over triples of a knowledge graph."""
