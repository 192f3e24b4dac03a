"""The definition of everything octavo computes, in NumPy and nothing else.

Read in this order: `ops` (each operation by itself), `llama` (the forward pass made of them, with
KV cache and named taps), `sampling` (from logits to the next token); `nodes` has a model's ops one
by one, for tools. The native core is tested against these files op by op, layer by layer and token
by token, so octavo does what they say. They are written to be read, not to be fast.
"""
