"""Reinforcement learning: a policy writes, rules score what it wrote, and a loss makes the better of it likelier."""
