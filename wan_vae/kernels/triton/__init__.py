"""The family of kernels written in Triton."""

from .kernels import make_family

__all__ = ["make_family"]
