"""Compiles jitted functions for an NVIDIA H200 on a machine that has no GPU, and reads facts from the compiled programs."""
