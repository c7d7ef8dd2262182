"""The family of kernels written in Triton."""
