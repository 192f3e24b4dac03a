"""The native core with a model: weights loaded, cache sized, ready to step."""
