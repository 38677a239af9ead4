"""Use an existing model for a task without training it."""
