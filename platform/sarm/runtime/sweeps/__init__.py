"""Ablations on Ray Tune."""
