"""Counter-based noise: a number is a pure function of a key and a counter, on any device, compiled or not."""

from torchstone.ops.noise.reference import bits, gumbel, mix, uniform

__all__ = ["bits", "gumbel", "mix", "uniform"]
