"""Structured texts: grammars compiled for a tokenizer, and which tokens may come next (xgrammar)."""
