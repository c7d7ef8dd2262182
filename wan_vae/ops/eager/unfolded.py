"""A convolution without a library behind it, in the forms that it can take with plain PyTorch.

`torch.nn.functional.conv3d` then holds every input number once for each of its 27 taps. What the
forms here hold beside input and result:

| form | how | beside input and result |
|---|---|---|
| "columns" | rows of NDHWC pixels are unfolded, a slice of rows at a time; one product for each frame | `SLICE_BYTES` |
| "taps" | no unfolding: a product for each tap, added up | a slice of rows |
| "planes" | one 2-D convolution for each temporal tap, added up | a result, and what conv2d takes |

"columns" unfolds the spatial taps of all frames of a slice next to each other, [pixels, T, kH*kW*C].
The operand of the product for one frame is then a window of kT frames, [pixels, kT*kH*kW*C], a view:
nothing is unfolded along time, all taps are summed up inside one product (in float32), and the result
is rounded once. "taps" and "planes" round after each product in half precision.

`wan-vae bench forms` times the forms on a card, beside conv3d in the same state.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from ... import layout

Form = Literal["columns", "taps", "planes"]

# The form that runs where conv3d has no library behind it. To choose another, change this line.
UNFOLDED: Form = "columns"

# Bytes of unfolded columns at a time. Large enough that launches do not dominate, small against the
# features of a pass.
SLICE_BYTES = 128 << 20

Around = tuple[int, int, int, int]


@dataclass(frozen=True)
class ConvSize:
    """One convolution: input [B, C, T, H, W], weight [O, C, kT, kH, kW].

    around: zero rows above and below, zero columns left and right.
    """

    input: tuple[int, int, int, int, int]
    weight: tuple[int, int, int, int, int]
    stride: tuple[int, int, int] = (1, 1, 1)
    around: Around = (0, 0, 0, 0)

    @property
    def out(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the result."""
        _, _, t, h, w = self.input
        _, _, kt, kh, kw = self.weight
        top, bottom, left, right = self.around
        st, sh, sw = self.stride
        return (
            (t - kt) // st + 1,
            (h + top + bottom - kh) // sh + 1,
            (w + left + right - kw) // sw + 1,
        )

    @property
    def is_pointwise(self) -> bool:
        """One tap, on every pixel: a product of matrices."""
        return self.weight[2:] == (1, 1, 1) == self.stride and not any(self.around)

    @property
    def padded_width(self) -> int:
        """Columns of the input with the zeros beside it."""
        return self.input[4] + self.around[2] + self.around[3]

    def input_rows(self, rows: int) -> int:
        """Rows of the input that `rows` rows of the result read."""
        return (rows - 1) * self.stride[1] + self.weight[3]

    def slice_rows(self, itemsize: int, frames: int) -> int:
        """Rows of the result whose columns over `frames` frames fit into `SLICE_BYTES`."""
        taps = self.weight[3] * self.weight[4]
        row_bytes = self.out[2] * frames * taps * self.input[1] * itemsize
        return max(1, min(self.out[1], SLICE_BYTES // row_bytes))


def conv(
    form: Form,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    stride: tuple[int, int, int] = (1, 1, 1),
    around: Around = (0, 0, 0, 0),
) -> torch.Tensor:
    """The convolution of `x` [B, C, T, H, W] with `weight` [O, C, kT, kH, kW], in `form`.

    `around`: see `ConvSize`. The result has the memory format of the weight, or that of `x` if the
    weight has none. For gradients use `torch.nn.functional.conv3d`: memory is written in place.
    """
    b, c, t, h, w = x.shape
    o, _, kt, kh, kw = weight.shape
    size = ConvSize((b, c, t, h, w), (o, c, kt, kh, kw), stride, around)
    if size.is_pointwise:
        return _pointwise(x, weight, bias)
    return _FORMS[form](x, weight, bias, size)


def hidden_bytes(form: Form, size: ConvSize, itemsize: int, is_ndhwc: bool) -> int:
    """Bytes that `conv` takes at most beside its input and its result.

    is_ndhwc: the memory format of the weight.
    """
    if size.is_pointwise:
        return 0
    b, c, t, h, w = size.input
    o, _, kt, kh, kw = size.weight
    frames, rows, cols = size.out
    if form == "planes":
        plane = o * rows * cols * itemsize
        # A second result where frames are added up, and NCDHW frames as a batch.
        return frames * b * ((plane if kt > 1 else 0) + (0 if is_ndhwc else c * h * w * itemsize))
    read = t if form == "columns" else kt
    n = size.slice_rows(itemsize, read)
    slab = read * size.input_rows(n) * size.padded_width * c
    if form == "taps":
        return itemsize * (slab + (kw - 1) * c + n * size.padded_width * o)
    piece = 0 if is_ndhwc else n * cols * o
    return itemsize * (slab + n * cols * read * kh * kw * c + piece)


def _pointwise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """A 1x1x1 convolution in the memory format of `x`."""
    b, c, t, h, w = x.shape
    matrix = weight.reshape(-1, c)
    if layout.detect(x) == "channels_last_3d":
        y = F.linear(x.permute(0, 2, 3, 4, 1).reshape(-1, c), matrix, bias)
        return y.view(b, t, h, w, -1).permute(0, 4, 1, 2, 3)
    flat = x.reshape(b, c, -1)
    weights = matrix.expand(b, -1, -1)
    if bias is None:
        return torch.bmm(weights, flat).view(b, -1, t, h, w)
    return torch.baddbmm(bias[:, None], weights, flat).view(b, -1, t, h, w)


def _columns(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: ConvSize
) -> torch.Tensor:
    b, c, t, _, _ = size.input
    o, _, kt, kh, kw = size.weight
    (frames, rows, cols), (st, sh, sw) = size.out, size.stride
    matrix = weight.permute(2, 3, 4, 1, 0).reshape(-1, o)
    y, ndhwc = _result(x, weight, size)
    n = size.slice_rows(x.itemsize, t)
    slabs = _Slabs(x, size, range(t), n)
    columns = x.new_empty((n * cols, t, kh * kw * c))
    # Words of eight bytes: a copy of two-byte numbers reaches a third of the memory's speed.
    words = c * x.itemsize % 8 == 0
    per_pixel = c * x.itemsize // 8 if words else c
    for batch in range(b):
        for first in range(0, rows, n):
            own = min(n, rows - first)
            slab = slabs.fill(batch, 0, first, own)
            target = columns[: own * cols].view(own, cols, t, kh, kw * c)
            if words:
                slab, target = slab.view(torch.int64), target.view(torch.int64)
            row = size.padded_width * per_pixel
            # A row of taps is a run of memory in NDHWC.
            windows = slab.as_strided(
                (own, cols, t, kh, kw * per_pixel),
                (sh * row, sw * per_pixel, size.input_rows(own) * row, row, 1),
            )
            target.copy_(windows)
            for i in range(frames):
                operand = columns[: own * cols, i * st : i * st + kt].flatten(1)
                if ndhwc is not None:
                    out = ndhwc[batch, i, first : first + own].view(-1, o)
                    _product(operand, matrix, bias, out)
                else:
                    piece = _product(operand, matrix, bias, None).view(own, cols, o)
                    y[batch, :, i, first : first + own] = piece.permute(2, 0, 1)
                    del piece  # the next one is not made beside it
    return y


def _product(
    a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """a b + bias, in `out` if there is one."""
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _taps(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: ConvSize
) -> torch.Tensor:
    b, c, _, _, _ = size.input
    o, _, kt, kh, kw = size.weight
    (frames, rows, cols), (st, sh, sw) = size.out, size.stride
    width = size.padded_width
    if (sh, sw) != (1, 1):
        # A step would tear the runs of pixels apart on which this form stands.
        return _columns(x, weight, bias, size)
    matrices = weight.permute(2, 3, 4, 1, 0).reshape(-1, c, o)
    y, ndhwc = _result(x, weight, size)
    n = size.slice_rows(x.itemsize, kt)
    # The last taps read past the last row, for results between the rows that nobody uses.
    slabs = _Slabs(x, size, range(kt), n, behind=kw - 1)
    sums = x.new_empty((n * width, o))
    for batch in range(b):
        for i in range(frames):
            for first in range(0, rows, n):
                own = min(n, rows - first)
                slab = slabs.fill(batch, i * st, first, own)
                frame = size.input_rows(own) * width
                part = sums[: own * width]
                for tap, matrix in enumerate(matrices):
                    k, at = divmod(tap, kh * kw)
                    start = k * frame + at // kw * width + at % kw
                    operand = slab.as_strided((own * width, c), (c, 1), start * c)
                    if tap:
                        part.addmm_(operand, matrix)
                    else:
                        _product(operand, matrix, bias, part)
                values = part.view(own, width, o)[:, :cols]
                if ndhwc is not None:
                    ndhwc[batch, i, first : first + own] = values
                else:
                    y[batch, :, i, first : first + own] = values.permute(2, 0, 1)
    return y


def _planes(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, size: ConvSize
) -> torch.Tensor:
    b, _, _, h, w = size.input
    kt, st = size.weight[2], size.stride[0]
    frames = size.out[0]
    top, bottom, left, right = size.around
    if (top, left) != (bottom, right):
        x, top, left = F.pad(x, (left, right, top, bottom)), 0, 0
        h, w = x.shape[3:]
    found = layout.detect(weight)
    fmt = "channels_last_3d" if found == "channels_last_3d" else "contiguous"
    y: torch.Tensor | None = None
    for i in range(kt):
        # Frames as a batch: a view in NDHWC.
        read = x[:, :, i : i + (frames - 1) * st + 1 : st]
        batch = read.transpose(1, 2).reshape(b * frames, -1, h, w)
        plane = layout.to_format(weight[:, :, i], fmt)
        part = F.conv2d(batch, plane, bias if y is None else None, size.stride[1:], (top, left))
        y = part if y is None else y.add_(part)
        del batch, part
    assert y is not None  # a kernel has a tap
    return layout.to_format(y.unflatten(0, (b, frames)).transpose(1, 2), fmt)


_FORMS: dict[
    Form,
    Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, ConvSize], torch.Tensor],
] = {"columns": _columns, "taps": _taps, "planes": _planes}


def _result(
    x: torch.Tensor, weight: torch.Tensor, size: ConvSize
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The result, uninitialised, and a view [B, T, H, W, O] of it if it is NDHWC."""
    found = layout.detect(weight)
    fmt = layout.detect(x) if found == "either" else found
    frames, rows, cols = size.out
    shape = (size.input[0], size.weight[0], frames, rows, cols)
    if fmt != "channels_last_3d":
        return x.new_empty(shape), None
    b, o, *space = shape
    ndhwc = x.new_empty((b, *space, o))
    return ndhwc.permute(0, 4, 1, 2, 3), ndhwc


class _Slabs:
    """Rows of some frames of an input, [frames, rows, W, C], with zeros around the picture.

    The memory is the same for every slice.
    """

    def __init__(self, x: torch.Tensor, size: ConvSize, frames: range, rows: int, behind: int = 0):
        """frames: relative to the first one that is read. rows: of the result, at most. behind:
        zero pixels after the last row."""
        self._x, self._size, self._frames = x, size, frames
        self._row = size.padded_width * x.shape[1]
        most = len(frames) * size.input_rows(rows) * self._row + behind * x.shape[1]
        self._memory = x.new_zeros(most)
        self._rows = 0

    def fill(self, batch: int, frame: int, first: int, rows: int) -> torch.Tensor:
        """What `rows` rows of the result from `first` on read, from frame `frame` on."""
        x, size = self._x, self._size
        _, c, _, h, w = size.input
        top, _, left, _ = size.around
        high = size.input_rows(rows)
        if rows != self._rows:  # the zeros beside the picture stand elsewhere
            self._memory.zero_()
            self._rows = rows
        length = len(self._frames) * high * self._row
        slab = self._memory[:length].view(len(self._frames), high, size.padded_width, c)
        start = first * size.stride[1] - top
        above, below = max(0, -start), max(0, start + high - h)
        if above:
            slab[:, :above].zero_()
        if below:
            slab[:, high - below :].zero_()
        read = x[batch, :, frame : frame + len(self._frames), start + above : start + high - below]
        slab[:, above : high - below, left : left + w] = read.permute(1, 2, 3, 0)
        return slab
