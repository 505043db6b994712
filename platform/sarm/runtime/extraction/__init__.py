"""Passes over a corpus or pairs on Ray Data actors: activations, what they cost, how they get on."""
