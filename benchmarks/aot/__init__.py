"""Compiles jitted functions for NVIDIA GPUs on a machine that has none, and reads facts from the compiled programs."""
