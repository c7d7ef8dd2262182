"""`wan-vae bench ranks`: one decode over several devices, proven, timed, and broken.

In this order: correctness (no count of ranks gets a time before its picture was right), times,
faults that need real transports, and the same times emulated on one device. Ends within
`--limit-s`: what there was no time for is listed. On the CPU the same steps run with Gloo on a
narrow model and small pictures.
"""
