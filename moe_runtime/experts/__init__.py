"""Which rank holds which experts."""
