"""/v1/responses: OpenAI's Responses API on top of what answers a chat."""
