"""CUDA C++ kernels (csrc/cuda), one operation per file, named and called as the torch references."""
