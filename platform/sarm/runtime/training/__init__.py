"""SAE and reward-model training on Ray Train with DeepSpeed."""
