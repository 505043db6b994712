"""Scores of reward models, and comparisons."""
