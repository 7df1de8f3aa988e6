"""Networks in flax.linen, and what each says of itself."""
