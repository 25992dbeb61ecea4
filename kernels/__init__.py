"""Triton kernels. They import triton, so import them only through quantopt.backends."""
