"""Networks that features are taken from."""
