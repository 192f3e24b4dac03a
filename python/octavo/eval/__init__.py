"""`octavo eval`: perplexity, and how far a model's distributions lie from another's."""
