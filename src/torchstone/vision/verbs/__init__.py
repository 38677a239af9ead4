"""Tokenizers of pictures, and what an encoder learned of them."""
