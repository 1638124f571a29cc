"""Triton kernels of arr_fast: imported lazily, and only by `arr_fast.ops` and the command line."""
