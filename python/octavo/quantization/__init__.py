"""Quantized weights: which format each matrix takes, rounding to it, and directories of codes."""
