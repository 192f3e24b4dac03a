"""Weights: reading them from safetensors and GGUF files, fetching them, making random ones."""
