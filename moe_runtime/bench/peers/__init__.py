"""Other engines to compare with, each in a process of its own, run by a Python of its own if need be."""
