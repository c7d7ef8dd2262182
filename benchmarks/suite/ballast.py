"""Holds device memory in another process, so that a large card has as much free as a small one.

    with Ballast(leave_gib=8.0): ...          # 8 GiB are free on the current CUDA device

The process waits for its standard input to end, so that it never outlives its parent.
"""

from __future__ import annotations

import subprocess
import sys

import torch


class Ballast:
    """A process that leaves `leave_gib` GiB free, from `with` to its end; None holds nothing.

    What a process needs to use the card at all (its CUDA context, about 0.5 GiB) counts as used, as
    on a small card. Raises RuntimeError if so much is not free.
    """

    def __init__(self, leave_gib: float | None, device: str = "cuda"):
        self._leave_gib, self._device = leave_gib, device
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Ballast:
        if self._leave_gib is not None:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(self._leave_gib), self._device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert self._process.stdout is not None
            answer = self._process.stdout.readline().strip()
            if not answer.startswith("free"):
                self.__exit__()
                raise RuntimeError(f"the ballast does not hold: {answer or 'see its error above'}")
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.communicate()  # ends its input, and waits
            self._process = None


def hold(leave_gib: float, device: str) -> None:
    """Hold memory of `device` until standard input ends."""
    torch.cuda.set_device(torch.device(device, 0) if device == "cuda" else device)
    free, _ = torch.cuda.mem_get_info()
    held = int(free - leave_gib * 2**30)
    if held < 0:
        print(f"{free / 2**30:.1f} GiB are free, {leave_gib:g} were to be left", flush=True)
        return
    memory = torch.empty(held, dtype=torch.uint8, device="cuda")
    print(f"free: {torch.cuda.mem_get_info()[0]}", flush=True)
    sys.stdin.read()
    del memory


if __name__ == "__main__":
    hold(float(sys.argv[1]), sys.argv[2])
