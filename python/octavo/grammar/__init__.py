"""Structured outputs: which tokens may follow, so that the text fits a schema or a grammar."""
