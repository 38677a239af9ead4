"""Smaller models from larger ones: distillation, pruning, quantisation."""
