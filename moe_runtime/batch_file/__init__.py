"""Files of requests in OpenAI's batch format, answered line by line, by whoever can answer one."""
