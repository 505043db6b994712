"""The texts behind latents, and reward cards."""
