"""Data that policies answer: prompts with whatever verifiers need to know."""
