"""Objectives of adversarial training."""

from __future__ import annotations
