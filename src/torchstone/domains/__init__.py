"""Domains: kinds of data, models and objectives for other things than text, each in a folder of its own."""
