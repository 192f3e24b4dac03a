"""Searches for a good answer over several beams, which fork; engine/search.py runs them."""
