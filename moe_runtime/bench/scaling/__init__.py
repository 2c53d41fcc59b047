"""`bench scaling`: how throughput grows with the ranks that share the experts, and where the rest goes."""
