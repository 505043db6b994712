"""Explanations and ratings of latents by language models and people."""
