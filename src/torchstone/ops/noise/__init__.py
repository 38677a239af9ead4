"""Counter-based noise: a number is a pure function of a key and a counter, on any device, compiled or not."""

from torchstone.ops.noise.reference import bits, constant_key, gumbel, mix, uniform

__all__ = ["bits", "constant_key", "gumbel", "mix", "uniform"]
