"""Mathematics of codebooks on arrays: k-means, packing of codes, the layer solver. No Flax, no files."""
