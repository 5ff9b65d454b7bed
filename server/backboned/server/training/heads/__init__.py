"""Heads over frozen features: many are trained at a time, and the best is chosen."""
