"""Caches of a rank: paged KV blocks, state slots, how many of each fit, and their tensors."""
