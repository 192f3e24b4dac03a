"""The engine: what to compute in each step, and what to make of its result (docs/engine.md)."""
