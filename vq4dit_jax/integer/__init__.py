"""Mathematics of uniform integer grids on arrays: grids, rounding, the recursion of GPTQ."""
