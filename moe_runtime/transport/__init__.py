"""Sockets between drivers and ranks: requests in, tokens out, with no Ray call on the way."""
