"""The `moe-runtime` command."""
