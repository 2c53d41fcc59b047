"""The data plane: process groups and the dispatchers that carry tokens between ranks."""
