"""The family of compiled kernels from the package comfy-kitchen, where it is installed.

Newer releases of ComfyUI bring it. Nothing here needs it: it is looked for when a run asks for this
family, and what is missing is a reason.
"""

from .kernels import make_family

__all__ = ["make_family"]
