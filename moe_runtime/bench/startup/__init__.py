"""`bench startup`: seconds from the start of a process to its first token, and where they go."""
