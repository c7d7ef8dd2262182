"""Winograd along time: which frames are made together, and the matrices of F(4,3).

Four output frames y of a 3-tap convolution g of six frames d are y = A' ((G g) * (B' d)): six
products instead of twelve (F(2,3): four for two). The points are 0, p, -p, q, -q and infinity.
Products come in the order p, -p, q, -q, 0, infinity, in which a kernel makes them: with the first
four in four accumulators, A' works in place, and the last two are added to the first and the last
frame.

Quads end with a call's last frame. Behind a video's first frame, which stands alone, each latent
frame is four frames, so quads are latent frames, however the video is cut into chunks, because
each pass then has whole latent frames (`planning/passes.py`). Of the first quad three frames are
of the past.

Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015); points:
benchmarks/winograd_error.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Transform:
    """frames: how many of the result a convolution makes together, from `products` frames of its
    operand. (1 from 1: nothing is transformed.)"""

    frames: int
    products: int

    def groups(self, frames: int) -> int:
        """Pairs, quads or frames of a call that makes `frames` frames."""
        return -(-frames // self.frames)

    def operand_frames(self, frames: int, past: int) -> int:
        """Of the operand of such a call, with `past` history frames if nothing is transformed."""
        return past + frames if self.frames == 1 else self.groups(frames) * self.products


DIRECT, PAIRS, QUADS = Transform(1, 1), Transform(2, 4), Transform(4, 6)


@dataclass(frozen=True)
class Points:
    """The points 0, p, -p, q, -q and infinity, and a power of two for each row of `B'`.

    scales: what the rows of `into` are divided by, and those of `weights` multiplied, in the order
    of the products. They keep the operand in the range of float16.
    """

    p: float
    q: float
    scales: tuple[float, ...] = (1.0,) * QUADS.products

    @property
    def into(self) -> torch.Tensor:
        """B' [6, 6] float64: frames d0 to d5 -> the operand."""
        p, q = self.p, self.q
        pp, qq = p * p, q * q
        rows = [
            [0, -p * qq, -qq, p, 1, 0],
            [0, p * qq, -qq, -p, 1, 0],
            [0, -q * pp, -pp, q, 1, 0],
            [0, q * pp, -pp, -q, 1, 0],
            [pp * qq, 0, -(pp + qq), 0, 1, 0],
            [0, pp * qq, 0, -(pp + qq), 0, 1],
        ]
        return torch.tensor(rows, dtype=torch.float64) / self._scales

    @property
    def weights(self) -> torch.Tensor:
        """G [6, 3] float64: three taps -> the weights of the products."""
        p, q = self.p, self.q
        pp, qq = p * p, q * q
        of_p, of_q = 2 * pp * (pp - qq), 2 * qq * (qq - pp)
        rows = [
            [1 / of_p, p / of_p, pp / of_p],
            [1 / of_p, -p / of_p, pp / of_p],
            [1 / of_q, q / of_q, qq / of_q],
            [1 / of_q, -q / of_q, qq / of_q],
            [1 / (pp * qq), 0, 0],
            [0, 0, 1],
        ]
        return torch.tensor(rows, dtype=torch.float64) * self._scales

    @property
    def out(self) -> torch.Tensor:
        """A' [4, 6] float64: products -> output frames."""
        p, q = self.p, self.q
        rows = [
            [1, 1, 1, 1, 1, 0],
            [p, -p, q, -q, 0, 0],
            [p**2, p**2, q**2, q**2, 0, 0],
            [p**3, -(p**3), q**3, -(q**3), 0, 1],
        ]
        return torch.tensor(rows, dtype=torch.float64)

    @property
    def growth(self) -> torch.Tensor:
        """[6] float64: how many times as large as the frames a number of the operand may be."""
        return self.into.abs().sum(1)

    @property
    def _scales(self) -> torch.Tensor:
        return torch.tensor(self.scales, dtype=torch.float64)[:, None]


# Of the pairs of points with few binary digits, so that every constant of a kernel is exact in
# float32, the one with the smallest error on random frames (`wan-vae bench winograd`). The scales
# keep numbers below four times the frames', as F(2,3) in two dimensions does.
POINTS = Points(11 / 16, 11 / 8, (2.0, 2.0, 1.0, 1.0, 2.0, 2.0))


def pair_phases(
    g0: torch.Tensor, g1: torch.Tensor, g2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three taps -> the weights of the products of F(2,3), in the order 1, 2, 0, 3.

    Halved and negated by products, which are exact: CUDA has kernels of their own for a quotient
    and for a sign, and each process loads a kernel when it is first used (10 ms each, H200).
    """
    return (g0 + g1 + g2) * 0.5, (g0 - g1 + g2) * 0.5, g0, g2 * -1.0


def quad_phases(weight: torch.Tensor) -> torch.Tensor:
    """[O, C, 3, kH, kW] -> [6, O, C, kH, kW] float64: the weights of the products, in order.

    Not as a product of matrices, for which PyTorch would load and start cuBLAS: nothing else in a
    decode with kernels does. The order of the sum is that of the taps, on every device.
    """
    into = POINTS.weights.to(weight.device)[..., None, None, None, None]
    g0, g1, g2 = weight.detach().double().unbind(2)
    return into[:, 0] * g0 + into[:, 1] * g1 + into[:, 2] * g2


def grown_quad_phases(weight: torch.Tensor) -> torch.Tensor:
    """As `quad_phases`, times the growth of the frames that they meet: for a bound on the sums."""
    growth = POINTS.growth.to(weight.device)
    return quad_phases(weight) * growth[:, None, None, None, None]
