"""Models that are no Transformer: image tokenizers."""
