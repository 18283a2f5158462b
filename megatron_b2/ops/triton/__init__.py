"""Triton kernels, one operation per file, named and called as the torch references."""
