"""Vectors for Numba kernels, how kernels are compiled and called, and the threads that run them."""
