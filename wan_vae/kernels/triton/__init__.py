"""The family of kernels written in Triton."""

from .kernels import FAMILY, make_family

__all__ = ["FAMILY", "make_family"]
