"""Generation: an engine that continues prompts, how tokens are chosen, and where randomness comes from."""

from __future__ import annotations

from torchstone.generate.engine import Completion, Engine, Event
from torchstone.generate.noise import NoiseSource, Request
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.generate.sampling import Choice, Guide, History, Sampling

__all__ = [
    "Choice",
    "Completion",
    "Engine",
    "Event",
    "Guide",
    "History",
    "NoiseSource",
    "Request",
    "Sampling",
    "SeededNoise",
]
