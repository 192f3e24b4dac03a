"""Model families: from a Hugging Face configuration to a `ModelSpec` and a map of weight names."""
