"""Verification of kernels: parity with float64, machine code without a GPU, CUDA sources on the CPU."""
