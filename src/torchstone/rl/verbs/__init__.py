"""Answers of policies: sample, score, replay, keep the good ones."""
