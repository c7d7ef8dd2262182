"""The building blocks of decoder and encoder. They keep no state between calls: what a call needs
besides its input is in a `Step`.

All shapes are [B, C, T, H, W]. Attributes have the names of native checkpoints ("residual.2",
"resample.1"), so a native state dict loads without renaming.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import nn

from .. import layout
from ..chunking import Chunk, PassEnds
from ..layout import LayoutCounter
from ..ops.opset import FusedConv, HaloExchange, OpSet, eager_ops
from .cache import FeatureCache, may_overwrite


@dataclass(frozen=True)
class Step:
    """Everything that the network needs to process one chunk.

    cache: past frames by slot (the name of a layer). chunk: the latent frames to process.
    exchange: access to the neighbours of a shard; None if the features are those of the whole
    picture. ops: the function for each operation. counter: counts format conversions and mixed
    calls.
    pass_frames: how many frames each stage of the decoder takes at once; empty: all of them.
    pass_ends: how many it takes in the first and in the last pass.
    """

    cache: FeatureCache
    chunk: Chunk
    exchange: HaloExchange | None = None
    ops: OpSet = field(default_factory=eager_ops)
    counter: LayoutCounter = field(default_factory=LayoutCounter)
    pass_frames: tuple[int, ...] = ()
    pass_ends: PassEnds = field(default_factory=PassEnds)

    @staticmethod
    def whole_clip(latent_frames: int) -> Step:
        """A step for a whole clip at once with fresh history, as in training."""
        return Step(FeatureCache(), Chunk(0, latent_frames, is_first=True, is_last=True))


class RMSNorm(nn.Module):
    """The gain of an RMS norm over channels: [C] followed by `trailing` dimensions of size 1."""

    def __init__(self, channels: int, trailing: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *([1] * trailing)))


def _fresh_weight(*shape: int) -> nn.Parameter:
    """The weight of a layer that nobody has trained.

    On `meta`, where weights are put into the model afterwards, there are no numbers to begin with:
    to make them would take a third of the time that the model takes.
    """
    weight = nn.Parameter(torch.empty(shape))
    if not weight.is_meta:
        nn.init.kaiming_uniform_(weight, a=5**0.5)
    return weight


class CausalConv3d(nn.Module):
    """Convolution over present and past frames: kernel (kT, kH, kW), zero padding in space.

    The past frames come from the cache under `slot`: the native name of this layer, which the
    network sets when it is built.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
    ):
        super().__init__()
        self.kernel = kernel
        self.slot = ""
        self.weight = _fresh_weight(out_channels, in_channels, *kernel)
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """[B, C, T, H, W] -> [B, O, T, H, W]. Before the first chunk, the history is zero."""
        return self.convolve(self.operand(x, step), step)

    def operand(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """Add halo rows and history frames to `x`, as `convolve` needs them.

        Separate from `convolve`, so that a caller can free `x` before the convolution runs.
        """
        if step.exchange is not None and any(self._padding):
            # Before the history is joined, so that its frames include halo rows.
            x = step.exchange.surround(x, self.slot)
        past = self.kernel[0] - 1
        if not past or step.chunk.is_only_frame:
            return x
        return with_history(x, self.slot, past, self.weight, step)

    def convolve(self, operand: torch.Tensor, step: Step) -> torch.Tensor:
        """Convolve an `operand` [B, C, T + history, H (+ halo), W] -> [B, O, T, H, W]."""
        # In a video of one frame all history is zero: only the kernel's last slice matters.
        only_frame = step.chunk.is_only_frame and self.kernel[0] > 1
        return step.ops.conv3d(
            operand,
            self.weight,
            self.bias,
            step.counter,
            padding=self.padding(step),
            last_slice=only_frame,
        )

    @property
    def _padding(self) -> tuple[int, int]:
        return self.kernel[1] // 2, self.kernel[2] // 2

    def padding(self, step: Step) -> tuple[int, int]:
        """Zero rows and columns on each side; 0 on the axis that has halo rows instead."""
        padding = self._padding
        if step.exchange is None or not any(padding):
            return padding
        return step.exchange.padding(padding)


class StridedTimeConv3d(CausalConv3d):
    """Temporal convolution that halves the number of frames: kernel 3, stride 2.

    It needs one past frame. The first frame of a video passes unchanged and is the first history.
    """

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        """First chunk: T = 1 + 2n frames -> 1 + n. Later chunks: T = 2n frames -> n."""
        first, frames = step.chunk.is_first, x
        if first:
            passed = x[:, :, :1]
        else:
            # The history gets no name: it is freed before the next one is made.
            frames = layout.join_frames(
                (step.cache.take(self.slot, x, 1), x), self.weight, step.counter
            )
        if not step.chunk.is_last:
            step.cache.store(self.slot, x[:, :, -1:].clone())
        if first and x.shape[2] == 1:
            return passed
        y = step.ops.conv3d(frames, self.weight, self.bias, step.counter, stride=(2, 1, 1))
        return torch.cat((passed, y), dim=2) if first else y


class Conv2d(nn.Module):
    """Weight and bias of a 2-D convolution that is applied to each frame."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.weight = _fresh_weight(out_channels, in_channels, kernel, kernel)
        self.bias = nn.Parameter(torch.zeros(out_channels))


def with_history(
    x: torch.Tensor,
    slot: str,
    past: int,
    weight: torch.Tensor,
    step: Step,
    fill: Callable[[torch.Tensor], object] | None = None,
) -> torch.Tensor:
    """Join the `past` history frames and `x` in the weight's format, and store the new history.

    `buffer = [history, x]; history = buffer[-past:]` holds for every chunk length, also for one
    that is shorter than `past`. So every chunk schedule is exact. fill: writes what is joined in
    the place of `x`, from `x`, into memory of its shape; saves the copy.
    """
    history = step.cache.take(slot, x, past)
    if fill is None:
        buffer = layout.join_frames((history, x), weight, step.counter)
    else:
        buffer = layout.frames_before(history, x, weight, step.counter)
        fill(buffer[:, :, past:])
    if step.chunk.is_last:
        return buffer
    tail = buffer[:, :, -past:]
    if not step.chunk.is_first and may_overwrite(history):
        step.cache.store(slot, history.copy_(tail))
        return buffer
    del history  # zeros; freed before the first history is allocated
    # A copy: a view would keep the whole buffer of this chunk alive.
    step.cache.store(slot, tail.clone())
    return buffer


def frames_to_batch(x: torch.Tensor) -> torch.Tensor:
    """[B, C, T, H, W] -> [B*T, C, H, W]; a view if `x` is NDHWC."""
    b, c, t, h, w = x.shape
    return x.transpose(1, 2).reshape(b * t, c, h, w)


def batch_to_frames(x: torch.Tensor, batch: int) -> torch.Tensor:
    """[B*T, C, H, W] -> [B, C, T, H, W]; a view."""
    n, c, h, w = x.shape
    return x.view(batch, n // batch, c, h, w).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and 3x3x3 convolution, plus a shortcut (1x1x1 if the widths differ)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        # The missing numbers are SiLU and dropout, which have no tensors.
        self.residual = nn.ModuleDict(
            {
                "0": RMSNorm(in_channels),
                "2": CausalConv3d(in_channels, out_channels),
                "3": RMSNorm(out_channels),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = (
            CausalConv3d(in_channels, out_channels, (1, 1, 1))
            if in_channels != out_channels
            else None
        )

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        (norm1, conv1), (norm2, conv2) = self.normed_convolutions()
        y = norm_silu_conv(x, norm1, conv1, step)
        # Not earlier: memory peaks in the first convolution, which is wider.
        skip = x if self.shortcut is None else self.shortcut(x, step)
        fused = fused_conv(conv2, step)
        if fused is not None:
            frames = y.shape[2]
            y = fused_operand(fused, y, conv2, step)
            return fused_convolve(fused, y, frames, conv2, step, skip)
        # `y` is rebound, so each tensor is freed when the next one exists.
        if joins_norm(y, norm2, conv2, step):
            y = joined_operand(y, norm2, conv2, step)
        else:
            y = step.ops.norm_silu(y, norm2.gamma)
            y = conv2.operand(y, step)
        y = conv2.convolve(y, step)
        return add(y, skip)

    def normed_convolutions(self) -> list[tuple[RMSNorm, CausalConv3d]]:
        """Pairs of a norm and the convolution that reads its result."""
        first, second = self.residual["0"], self.residual["3"]
        return [
            (cast(RMSNorm, first), cast(CausalConv3d, self.residual["2"])),
            (cast(RMSNorm, second), cast(CausalConv3d, self.residual["6"])),
        ]


def add(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y + x. Overwrites `y`, which nobody else may read, unless a gradient needs it."""
    return y + x if y.requires_grad or x.requires_grad else y.add_(x)


def norm_silu_conv(x: torch.Tensor, norm: RMSNorm, conv: CausalConv3d, step: Step) -> torch.Tensor:
    """`conv(silu(norm(x)))`, with a fused kernel if there is one, otherwise step by step."""
    fused = fused_conv(conv, step)
    if fused is not None:
        y = fused_operand(fused, x, conv, step)
        return fused_convolve(fused, y, x.shape[2], conv, step)
    if joins_norm(x, norm, conv, step):
        y = joined_operand(x, norm, conv, step)
    else:
        y = step.ops.norm_silu(x, norm.gamma)
        y = conv.operand(y, step)
    return conv.convolve(y, step)


def joins_norm(x: torch.Tensor, norm: RMSNorm, conv: CausalConv3d, step: Step) -> bool:
    """Whether a norm of `x` writes into the operand of `conv`, as the forms of the run say.

    Not with halo rows, which are exchanged behind the norm, not without history, and not where a
    gradient needs what is in between.
    """
    if torch.is_grad_enabled() and (x.requires_grad or norm.gamma.requires_grad):
        return False
    has_history = conv.kernel[0] > 1 and not step.chunk.is_only_frame
    return step.ops.forms.joined_norm and step.exchange is None and has_history


def joined_operand(x: torch.Tensor, norm: RMSNorm, conv: CausalConv3d, step: Step) -> torch.Tensor:
    """The operand of `conv`: the history frames, then `silu(norm(x))`, written in its place."""

    def fill(frames: torch.Tensor) -> None:
        step.ops.norm_silu(x, norm.gamma, out=frames)

    return with_history(x, conv.slot, conv.kernel[0] - 1, conv.weight, step, fill)


def head(layers: nn.ModuleDict, x: torch.Tensor, step: Step) -> torch.Tensor:
    """The last norm, SiLU and convolution of a network, from its `head`."""
    return norm_silu_conv(x, cast(RMSNorm, layers["0"]), cast(CausalConv3d, layers["2"]), step)


def fused_conv(conv: CausalConv3d, step: Step) -> FusedConv | None:
    """The fused kernel for norm, SiLU and `conv`, or None."""
    return step.ops.fused_conv(conv.weight)


def fused_operand(
    fused: FusedConv, x: torch.Tensor, conv: CausalConv3d, step: Step
) -> torch.Tensor:
    """Make the operand of a fused kernel: the history frames, then `silu(norm(x))`.

    Stores the new history; after the last chunk there is none.

    Shards exchange rows of `x`, before the norm. The norm works on single pixels, so each rank
    computes the same bits as its neighbour, and zero rows stay zero.
    """
    only_frame = step.chunk.is_only_frame
    read = step.cache.pop if step.chunk.is_last else step.cache.peek
    before = None if only_frame else read(conv.slot)
    operand, history = fused.operand(
        x,
        before,
        only_frame=only_frame,
        keep=not step.chunk.is_last,
        overwrite=before is not None and may_overwrite(before),
        halo=None if step.exchange is None else step.exchange.halo_rows_of(x, conv.slot),
    )
    if history is not None:
        step.cache.store(conv.slot, history)
    return operand


def fused_convolve(
    fused: FusedConv,
    operand: torch.Tensor,
    frames: int,
    conv: CausalConv3d,
    step: Step,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve an operand from `fused_operand` and add `residual`; returns `frames` frames."""
    return fused.convolve(
        operand,
        frames,
        residual,
        padding=conv.padding(step),
        only_frame=step.chunk.is_only_frame,
    )


class Attention(nn.Module):
    """One attention head over all pixels of each frame, with a residual connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels, trailing=2)
        self.to_qkv = Conv2d(channels, 3 * channels, 1)
        self.proj = Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        b, c, _, h, w = x.shape
        y = step.ops.norm(frames_to_batch(x), self.norm.gamma)
        if step.exchange is not None:
            # Each rank needs the keys and values of all pixels. Gather their common input, which is
            # half as large. The 1x1 convolution is then done on every rank, but it is small
            # compared with the attention, whose queries are divided among the ranks.
            y = step.exchange.gather_rows(y, "attention")
        qkv = step.ops.conv2d(y, self.to_qkv.weight, self.to_qkv.bias, step.counter)
        # Channels last, also if the features are not: with other strides CUDA's attention falls
        # back to one that stores the scores of all pairs of pixels (4 GB at 1080p).
        q, k, v = qkv.flatten(2).transpose(1, 2).contiguous().split(c, dim=2)
        if step.exchange is not None:
            q = step.exchange.own_rows(qkv[:, :c]).flatten(2).transpose(1, 2).contiguous()
        y = step.ops.attention(q, k, v).transpose(1, 2).unflatten(2, (h, w))
        y = step.ops.conv2d(y, self.proj.weight, self.proj.bias, step.counter)
        return add(batch_to_frames(y, b), x)


class Upsample(nn.Module):
    """Doubles height and width and, if `temporal`, the number of frames after the first."""

    def __init__(self, channels: int, out_channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv2d(channels, out_channels, 3)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        if self.time_conv is not None:
            x = _double_time(self.time_conv, x, step)
        conv = self.resample["1"]
        frames, padding = frames_to_batch(x), (1, 1)
        if step.exchange is not None:
            frames = step.exchange.surround(frames, "upsample")
            padding = step.exchange.padding(padding)
        y = step.ops.upsample_conv2d(frames, conv.weight, conv.bias, step.counter, padding=padding)
        return batch_to_frames(y, x.shape[0])


def _double_time(time_conv: CausalConv3d, x: torch.Tensor, step: Step) -> torch.Tensor:
    # The first latent frame of the video becomes one pixel frame, so it is not doubled. The
    # history of the temporal convolution starts after it, with zeros.
    passed = x[:, :, :1] if step.chunk.is_first else x[:, :, :0]
    rest = x[:, :, passed.shape[2] :]
    if rest.shape[2] == 0:
        return passed
    doubled = _interleave(time_conv(rest, step))
    return torch.cat((passed, doubled), dim=2) if passed.shape[2] else doubled


def _interleave(pairs: torch.Tensor) -> torch.Tensor:
    """Two frames stored in channels [B, 2C, T, H, W] -> [B, C, 2T, H, W], same memory format."""
    b, c, t, h, w = pairs.shape
    if layout.detect(pairs) != "channels_last_3d":
        apart: torch.Tensor = pairs.unflatten(1, (2, c // 2))
        return apart.permute(0, 2, 3, 1, 4, 5).reshape(b, c // 2, 2 * t, h, w)
    # Move whole pixels, because the way through NCDHW and back takes 5% of a decode. Move words of
    # eight bytes, because a copy of two-byte numbers reaches a third of the memory's speed.
    # `to_format` also normalises strides of size-1 dimensions, which a view as words would refuse.
    frames = layout.to_format(pairs, "channels_last_3d").permute(0, 2, 3, 4, 1)
    words = _has_words(pairs, c // 2)
    moved: torch.Tensor = frames.view(torch.int64) if words else frames
    moved = moved.unflatten(4, (2, -1)).permute(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, -1)
    return (moved.view(pairs.dtype) if words else moved).permute(0, 4, 1, 2, 3)


def _has_words(x: torch.Tensor, channels: int) -> bool:
    """Whether pixels of `channels` can be moved in words of eight bytes: not where a gradient needs
    their numbers, where a pixel is a single word, or where the first does not begin with one."""
    size, start = channels * x.itemsize, int(x.storage_offset()) * x.itemsize
    return not x.requires_grad and size % 8 == start % 8 == 0 and size > 8


class Downsample(nn.Module):
    """Halves height and width and, if `temporal`, the number of frames after the first."""

    def __init__(self, channels: int, temporal: bool):
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv2d(channels, channels, 3)})
        self.time_conv = StridedTimeConv3d(channels, channels, (3, 1, 1)) if temporal else None

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        conv = self.resample["1"]
        # The network was trained with padding on the right and at the bottom only.
        y, bottom, right = frames_to_batch(x), 1, 1
        if step.exchange is not None:
            y = step.exchange.surround(y, "downsample", before=0, after=1)
            bottom, right = step.exchange.padding((bottom, right))
        y = step.ops.conv2d(
            y, conv.weight, conv.bias, step.counter, stride=2, pad_after=(bottom, right)
        )
        y = batch_to_frames(y, x.shape[0])
        return y if self.time_conv is None else self.time_conv(y, step)


class DuplicateShortcut(nn.Module):
    """Wan 2.2's shortcut without parameters around an up-sampling stage.

    Unfolds channels into space (and time), and repeats them if there are too few. Source: Wan 2.2's
    `DupUp3D`.
    """

    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_s: int):
        super().__init__()
        self.out_channels, self.factor_t, self.factor_s = out_channels, factor_t, factor_s
        self.groups = in_channels // out_channels
        self.repeats = factor_t * factor_s**2 // self.groups

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        b, _, t, h, w = x.shape
        ft, fs = self.factor_t, self.factor_s
        # In the memory format of `x`, which is that of what it is added to: a copy into the other
        # one, and a sum of both, took 16% of a decode. Words of eight bytes as in `_interleave`.
        # Of one video: some frames of several lie apart.
        is_last = layout.detect(x[:1]) == "channels_last_3d"
        y, words = x, False
        if layout.detect(x) == "channels_last_3d":
            words = self.groups == 1 and _has_words(x, self.out_channels)
            y = layout.to_format(x, "channels_last_3d")
        if words:
            y = y.permute(0, 2, 3, 4, 1).view(torch.int64).permute(0, 4, 1, 2, 3)
        # Repeat with strides, so that only the last reshape copies.
        y = y.reshape(b, -1, self.groups, 1, t, h, w).expand(-1, -1, -1, self.repeats, -1, -1, -1)
        y = y.reshape(b, y.shape[1], ft, fs, fs, t, h, w)
        if is_last:
            y = y.permute(0, 5, 2, 6, 3, 7, 4, 1).reshape(b, t * ft, h * fs, w * fs, -1)
            y = (y.view(x.dtype) if words else y).permute(0, 4, 1, 2, 3)
        else:
            y = y.permute(0, 1, 5, 2, 6, 3, 7, 4)
            y = y.reshape(b, self.out_channels, t * ft, h * fs, w * fs)
        return y[:, :, ft - 1 :] if step.chunk.is_first else y


class AverageShortcut(nn.Module):
    """Wan 2.2's shortcut without parameters around a down-sampling stage.

    Folds space (and time) into channels and averages groups of them: the pixels of a square of one
    frame, in every VAE that has this shortcut. Source: Wan 2.2's `AvgDown3D`. Averages are float32
    sums, term by term, rounded once. `mean` is not used, because on CUDA the order of its sum
    depends on the size, and a shard must have the bits of the whole picture.
    """

    def __init__(self, in_channels: int, out_channels: int, factor_t: int, factor_s: int):
        super().__init__()
        assert out_channels == in_channels * factor_t, "a group would not be a square's pixels"
        self.out_channels, self.factor_t, self.factor_s = out_channels, factor_t, factor_s

    def forward(self, x: torch.Tensor, step: Step) -> torch.Tensor:
        ft, fs = self.factor_t, self.factor_s
        if ft == fs == 1:
            return x
        b, c, t, h, w = x.shape
        frames, rows, columns = -(-t // ft), h // fs, w // fs
        # [B, C, ft, frames, rows, columns] in the memory format of `x`, as in `DuplicateShortcut`:
        # the copy into NCDHW, and the sum of both formats, took more time than the averages.
        is_last = layout.detect(x[:1]) == "channels_last_3d"
        shape = (b, frames, rows, columns, c, ft) if is_last else (b, c, ft, frames, rows, columns)
        sums = x.new_empty(shape, dtype=torch.float32)
        total = sums.permute(0, 4, 5, 1, 2, 3) if is_last else sums
        # Only the first chunk has an odd number of frames: the frame before the video is zero.
        missing = -t % ft
        alone = ft - missing if missing else 0
        if alone:
            total[:, :, :missing, :1].zero_()
            self._sum(x[:, :, :alone].unsqueeze(3), total[:, :, missing:, :1])
        if t > alone:
            groups = x[:, :, alone:].unflatten(2, (-1, ft)).transpose(2, 3)
            self._sum(groups, total[:, :, :, frames - groups.shape[3] :])
        y = sums.div_(fs**2).to(x.dtype)
        if is_last:
            return y.reshape(b, frames, rows, columns, c * ft).permute(0, 4, 1, 2, 3)
        return y.reshape(b, c * ft, frames, rows, columns)

    def _sum(self, x: torch.Tensor, total: torch.Tensor) -> None:
        """Write the sum of each square of `x` [..., H, W] into `total`. The squares' corners are
        views, so nothing else is copied."""
        corners = [
            x[..., row :: self.factor_s, column :: self.factor_s]
            for row in range(self.factor_s)
            for column in range(self.factor_s)
        ]
        total.copy_(corners[0])
        for corner in corners[1:]:
            total.add_(corner)


def name_slots(network: nn.Module, prefix: str) -> None:
    """Set the slot of each causal convolution to its native name, such as `decoder.head.2`."""
    for name, module in network.named_modules():
        if isinstance(module, CausalConv3d):
            module.slot = f"{prefix}{name}"
