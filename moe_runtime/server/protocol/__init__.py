"""The shapes of requests and answers: OpenAI's, with vLLM's extra fields."""
