"""Models that score triples of a knowledge graph."""
