"""Kernels for NVIDIA Hopper (sm_90a) in Pallas' Mosaic GPU dialect."""
