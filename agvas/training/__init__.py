"""Training: procedural data, objective and trainer."""
