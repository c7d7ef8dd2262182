"""Time the Triton kernels beside cuDNN on the layers of Wan 2.1 at 720p; gate first.

`python benchmarks/kernels.py`, one CUDA device. A configuration gets a time only if two runs on
random data are equal bit for bit and within 5e-4 of a float32 convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wan_vae.ops import triton_conv3d as conv
from wan_vae.ops import triton_head, triton_norm
from wan_vae.ops.norm import rms_norm_silu

LAST = torch.channels_last_3d
C = conv.Config
LAYERS = [
    (96, 4, 720, 1280, [C(4, 8, 8, 64, 32, 32, 4, 3), C(4, 8, 8, 64, 32, 32, 4, 2),
                        C(4, 8, 16, 64, 32, 32, 8, 3), C(4, 8, 16, 64, 32, 32, 8, 2)]),
    (192, 4, 360, 640, [C(4, 8, 8, 64, 32, 32, 4, 3), C(4, 8, 16, 64, 32, 32, 8, 3),
                        C(2, 8, 16, 128, 64, 32, 8, 3)]),
    (384, 2, 180, 320, [C(2, 8, 16, 128, 64, 32, 8, 3), C(2, 8, 16, 64, 32, 32, 8, 3)]),
]  # fmt: skip


def median_ms(work, repeats: int = 9) -> float:
    work()
    marks = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        marks.append((start, stop))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in marks)[repeats // 2]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b).norm() / b.norm()).item()


def main() -> None:
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    for c, t, h, w, configs in LAYERS:
        x = torch.randn(1, t + 2, h, w, c, device="cuda").half().permute(0, 4, 1, 2, 3)
        weight = (torch.randn(c, c, 3, 3, 3, device="cuda") / (27 * c) ** 0.5).half()
        weight = weight.contiguous(memory_format=LAST)
        bias = torch.randn(c, device="cuda").half()
        small = x[..., : h // 4, : w // 4].contiguous(memory_format=LAST)
        expected = F.conv3d(small.float(), weight.float(), bias.float(), padding=(0, 1, 1))
        flops = 2 * 27 * c * c * t * h * w
        ms = median_ms(lambda x=x, k=weight, b=bias: F.conv3d(x, k, b, padding=(0, 1, 1)))
        print(f"{c} {t}x{h}x{w} cuDNN {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s", flush=True)
        for config in configs:
            try:
                y = conv.conv3d(small, weight, bias, None, config)
                error = relative(y, expected)
                full = conv.conv3d(x, weight, bias, None, config)
                bad = sum(
                    not torch.equal(full, conv.conv3d(x, weight, bias, None, config))
                    for _ in range(5)
                )
                if bad or not error < 5e-4:
                    print(f"  {config.name}: refused, error {error:.1e}, {bad} of 5 differ")
                    continue
                ms = median_ms(
                    lambda x=x, k=weight, b=bias, c=config: conv.conv3d(x, k, b, None, c)
                )
            except (RuntimeError, conv.triton.runtime.errors.OutOfResources) as error:
                print(f"  {config.name}: {str(error).splitlines()[0][:90]}", flush=True)
                continue
            print(f"  {config.name} {ms:.3f} ms {flops / ms / 1e9:.0f} TFLOP/s error {error:.1e}",
                  flush=True)  # fmt: skip
    x = torch.randn(1, 4, 720, 1280, 96, device="cuda").half().permute(0, 4, 1, 2, 3)
    gamma, history = torch.ones(96, device="cuda"), x[:, :, :2].contiguous(memory_format=LAST)
    fused = median_ms(lambda: triton_norm.norm_silu_join(x, gamma, history, 2, True))
    eager = median_ms(lambda: rms_norm_silu(x, gamma))
    print(f"norm+SiLU 96 4x720x1280: {fused:.3f} ms with history, eager {eager:.3f} without")
    buffer, _ = triton_norm.norm_silu_join(x, gamma, history, 2, False)
    weight = (torch.randn(3, 96, 3, 3, 3, device="cuda") / 50).half().contiguous(memory_format=LAST)
    y = triton_head.head_conv(buffer, weight, None)
    error = relative(y, F.conv3d(buffer.float(), weight.float(), padding=(0, 1, 1)))
    ours = median_ms(lambda: triton_head.head_conv(buffer, weight, None))
    cudnn = median_ms(lambda: F.conv3d(buffer, weight, padding=(0, 1, 1)))
    print(f"head 96 to 3: {ours:.3f} ms error {error:.1e}, cuDNN {cudnn:.3f} ms")


if __name__ == "__main__":
    main()
