"""`wan-vae bench`: this pack beside its peers in one process, on the same weights and latents.

Order: correctness gate first, then times. A contender whose picture is wrong gets no number.
"""

from .compare import main

__all__ = ["main"]
