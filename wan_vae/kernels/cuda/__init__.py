"""The family of kernels in CUDA C++, compiled at run time for the card in the machine.

No compiler is installed: NVRTC comes with PyTorch, the driver with the card.
"""

from .kernels import make_family

__all__ = ["make_family"]
