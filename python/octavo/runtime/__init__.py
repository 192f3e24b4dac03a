"""The native core with a model in it: weights loaded, cache sized, ready to be stepped."""
