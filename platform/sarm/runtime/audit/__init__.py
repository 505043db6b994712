"""Safety features, steering, poison and denoise."""
