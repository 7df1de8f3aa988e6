"""What the kernels and the sampler step take on a Hopper GPU, beside XLA, PyTorch and the hardware's floor."""
