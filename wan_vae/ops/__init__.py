"""Operations: one file each, the eager reference beside any faster kernel, chosen by `dispatch`."""

from .dispatch import OpSet, eager_ops

__all__ = ["OpSet", "eager_ops"]
