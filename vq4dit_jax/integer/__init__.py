"""Mathematics of uniform integer grids on arrays: grids, rounding, packed codes, the recursion of GPTQ."""
