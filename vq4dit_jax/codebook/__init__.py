"""Mathematics of codebooks on arrays: k-means, the layer solver. No Flax, no files."""
