"""The engine: decides what each step computes, and makes answers of it (docs/engine.md)."""
