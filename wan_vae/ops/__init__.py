"""What a layer computes: the operations, and the eager reference of each in plain PyTorch."""

from .opset import OpSet, eager_ops

__all__ = ["OpSet", "eager_ops"]
