"""`bench serve`: a load client for any OpenAI-compatible server. Nothing in it needs torch, Ray or the engine."""
