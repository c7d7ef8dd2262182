"""`wan-vae bench`: this pack and other decoders in one process, on the same weights and latents.

Reads in this order: cases say what is decoded, weights and decoders who decodes it with what,
measure gates and times, cold_start and roofline look closer at our own decode, write_up and plot
put it on paper, compare is that command line. ranks is one decode over several devices, scaling and
emulation predict it. command chooses the part. A decoder whose picture is wrong gets no number.
"""
