"""Times of the kernels and of the sampler step on a Hopper GPU, beside XLA, PyTorch and the hardware's floor."""
