"""A reward server: conversations, texts or token ids in; rewards, latents and flags out."""
