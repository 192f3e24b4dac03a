"""Speculative decoding: several tokens of an answer in one step, and never another answer."""
