"""How long a decode in strips takes whose frames, features or history wait on the host: a model.

A plan chooses by it among ways that all fit: more strips repeat more work, and history that waits
between parts of a video is copied, into memory that is page-locked first. The rates are those of an
H200 and its host. A slower card computes longer beside the same copies, so that they weigh less
there than the model says.
"""

from __future__ import annotations

from dataclasses import dataclass

# Multiplications a second in strips, counted as direct convolutions. NVIDIA H200 with 6 GB free, 81
# frames to IMAGE, bfloat16: 720p in three strips 1103 ms, 1080p in eight 2846; with cudaMallocAsync
# 1209 in four and 3264 in twelve. All four are within 4% of this (`wan-vae bench small`).
WORK_RATE = 3.2e14
# Bytes a second that come into page-locked memory while as many leave it: PCIe 4, counted.
BUS_RATE = 25e9
# Bytes a second that threads copy to or from ordinary memory. The same case: 0.90 GB of frames took
# 188 ms from there to the device, by CUDA's own copy while that waited; one thread of ours copies 5
# to 8 GB/s.
COPY_RATE = 5e9
# Bytes a second that are page-locked for the first time. The same card, 1080p in eight strips and
# four parts: 12.0 GB of history took 5.6 s, of which copies over the bus are 1.4.
LOCK_RATE = 2.6e9


@dataclass(frozen=True)
class Waiting:
    """What a decode in strips does, for its time.

    work: multiplications, with those that strips repeat. history_bytes: of all strips, as much as
    the host locks. boundaries: between parts, at each of which all history goes out and comes in.
    features_bytes: that go to ordinary memory and come back. pixels_bytes: that come back while the
    last strip is computed, which is last_work of the multiplications; they go there beside those of
    the other strips.
    """

    work: float
    history_bytes: int
    boundaries: int
    features_bytes: int
    pixels_bytes: int
    last_work: float

    @property
    def seconds(self) -> float:
        """The time of an H200."""
        history = self.history_bytes * (1 / LOCK_RATE + self.boundaries / BUS_RATE)
        features = self.features_bytes / COPY_RATE
        pixels = max(0.0, self.pixels_bytes / COPY_RATE - self.last_work / WORK_RATE)
        return self.work / WORK_RATE + history + features + pixels
