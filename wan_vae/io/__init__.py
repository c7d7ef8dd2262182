"""Files, latents, images and videos, and the sinks that take the pixels of a decode.

Public: `Sink`, the protocol, and two sinks for callers who pass `sink=` to `WanVAE.decode`.
"""

from .sink import CallbackSink, Sink, TensorSink

__all__ = ["CallbackSink", "Sink", "TensorSink"]
