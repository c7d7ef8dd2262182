"""`wan-vae bench`: this pack beside its peers in one process, on the same weights and latents.

Reads in this order: cases say what is decoded, weights and contenders who decodes it with what,
measure gates and times, cold_start and roofline look closer at our own decode, write_up and plot
put it on paper, command is the command line. A contender whose picture is wrong gets no number.
"""

from benchmarks.suite.command import main

__all__ = ["main"]
