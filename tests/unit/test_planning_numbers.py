"""Choices and bytes of full-size plans, as they were when the walk knew backends by name.

A change of the model of memory changes them; a change of the code around it must not.
"""

from __future__ import annotations

import pytest
import torch

from tests.unit.fake_layers import fake_layers
from wan_vae.config import wan21, wan22
from wan_vae.planning.choose import PASSES, Choice, PlanRequest, choose

CASES = {
    "wan2.1 480p x 81": (wan21(), (1, 16, 21, 60, 104)),
    "wan2.1 720p x 81": (wan21(), (1, 16, 21, 90, 160)),
    "wan2.1 1080p x 81": (wan21(), (1, 16, 21, 135, 240)),
    "wan2.2 720p x 121": (wan22(), (1, 48, 31, 44, 80)),
    "wan2.1 image 1024": (wan21(), (1, 16, 1, 128, 128)),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# In GiB, and whether the sink needs whole frames.
FREE = ((None, False), (8, False), (8, True), (6, False), (6, True))
# Weights and kernels of the rows. Kernels take the same for both formats of the weights.
ROWS = {
    "NCDHW": (("contiguous",), None),
    "NDHWC": (("channels_last_3d",), None),
    "triton": (("contiguous", "channels_last_3d"), "triton"),
    "cuda": (("contiguous", "channels_last_3d"), "cuda"),
}
# A column for each of FREE: strips/latent frames a chunk/part of a full pass:bytes (in 512), and
# for strips the thousandths of the work that they do twice.
EXPECTED = """
wan2.1 480p x 81: bf16
  NCDHW 1/2/1:11551020 1/2/1:11551020 1/2/1:11551020 1/2/2:7919340 1/2/2:7919340
  NDHWC 1/2/1:7956780 1/2/1:7956780 1/2/1:7956780 1/2/1:7956780 1/2/1:7956780
  triton 1/4/1:8256300 1/4/1:8256300 1/4/1:8256300 1/4/1:8256300 1/4/1:8256300
  cuda 1/4/1:8555820 1/4/1:8555820 1/4/1:8555820 1/4/1:8555820 1/4/1:8555820
wan2.1 480p x 81: fp32
  NCDHW 1/1/4:11888760 1/1/4:11888760 1/1/4:11888760 2/1/4:6731712+96 2/1/4:10486632+96
  NDHWC 1/1/4:10091640 1/1/4:10091640 1/1/4:10091640 1/1/4:10091640 1/1/4:10091640
  triton 1/4/1:16437720 1/4/2:12356760 1/4/2:12356760 2/4/2:7938528+93 3/1/1:10164024+187
  cuda 1/4/1:17036760 1/4/2:12356760 1/4/2:12356760 2/4/2:7166640+93 3/1/1:10164024+187
wan2.1 720p x 81: bf16
  NCDHW 1/1/1:17584200 1/1/2:13739400 1/1/2:13739400 3/1/1:7202400+128 5/1/1:12805800+256
  NDHWC 1/1/1:13437000 1/1/1:13437000 1/1/1:13437000 2/1/1:7442400+64 3/1/1:11509800+128
  triton 1/2/1:14128200 1/2/1:14128200 1/2/1:14128200 2/2/1:8616000+62 2/1/2:10766280+62
  cuda 1/2/1:14128200 1/2/1:14128200 1/2/1:14128200 2/2/1:7719840+62 3/1/1:11335080+124
wan2.1 720p x 81: fp32
  NCDHW 1/1/4:27435600 4/1/4:9701280+192 3/1/4:23394960+128 6/1/4:7385760+320 3/1/4:23394960+128
  NDHWC 1/1/4:23288400 3/1/4:9792000+128 2/1/4:21338160+64 5/1/4:6871680+256 2/1/4:21338160+64
  triton 1/2/1:28170000 3/2/2:10759680+124 2/1/2:21338160+62 4/2/2:8595840+186 2/1/2:21338160+62
  cuda 1/2/1:28170000 3/2/2:10881600+124 3/1/1:22468560+124 4/2/2:8811840+186 3/1/1:22468560+124
wan2.1 1080p x 81: bf16
  NCDHW 1/1/1:30913650 6/1/1:9112680+210 2/1/1:26268570+42 8/1/1:7371720+295 2/1/1:26268570+42
  NDHWC 1/1/1:26248050 4/1/1:9608760+126 2/1/1:23888250+42 6/1/1:7177320+210 2/1/1:23888250+42
  triton 1/2/1:26442450 3/2/1:11919960+81 3/1/2:23403690+81 4/2/2:8377560+122 3/1/2:23403690+81
  cuda 1/2/1:30427650 3/2/1:11919960+81 4/1/1:24530490+122 4/2/2:9412920+122 4/1/1:24530490+122
wan2.1 1080p x 81: fp32
  NCDHW 1/1/4:61730100 16/1/4:9154080+629 4/1/4:49986900+126 32/1/4:7417440+1295 4/1/4:49986900+126
  NDHWC 1/1/4:52398900 10/1/4:9527760+379 3/1/4:46426500+84 20/1/4:6972480+797 3/1/4:46426500+84
  triton 1/2/1:52787700 6/2/2:12493440+204 3/1/2:46386180+81 10/2/2:9401040+367 3/1/2:46386180+81
  cuda 1/2/1:60660900 8/2/2:11237040+285 4/1/1:48623220+122 12/2/2:9019440+447 4/1/1:48623220+122
wan2.2 720p x 121: bf16
  NCDHW 1/1/1:12180520 1/1/1:12180520 1/1/1:12180520 2/1/1:6929920+134 2/1/1:10201000+134
  NDHWC 1/1/1:10378280 1/1/1:10378280 1/1/1:10378280 1/1/1:10378280 1/1/1:10378280
  triton 1/2/1:10040360 1/2/1:10040360 1/2/1:10040360 1/2/1:10040360 1/2/1:10040360
  cuda 1/2/1:11884840 1/2/1:11884840 1/2/1:11884840 2/2/1:6771840+127 3/1/1:9859240+254
wan2.2 720p x 121: fp32
  NCDHW 1/1/4:24318800 4/1/4:9496640+398 2/1/4:20211920+134 8/1/4:7186560+919 2/1/4:20211920+134
  NDHWC 1/1/4:20714320 3/1/4:9554240+267 2/1/4:18338000+134 5/1/4:6863040+529 2/1/4:18338000+134
  triton 1/2/1:20038480 2/2/1:11639680+127 2/1/1:17869520+127 3/2/2:9405760+254 2/1/1:17869520+127
  cuda 1/2/1:23685200 3/2/1:10778240+254 3/1/1:19520720+254 4/2/1:8662400+378 3/1/1:19520720+254
wan2.1 image 1024: bf16
  NCDHW 1/1/1:4718592 1/1/1:4718592 1/1/1:4718592 1/1/1:4718592 1/1/1:4718592
  NDHWC 1/1/1:1376256 1/1/1:1376256 1/1/1:1376256 1/1/1:1376256 1/1/1:1376256
  triton 1/1/1:1179648 1/1/1:1179648 1/1/1:1179648 1/1/1:1179648 1/1/1:1179648
  cuda 1/1/1:1179648 1/1/1:1179648 1/1/1:1179648 1/1/1:1179648 1/1/1:1179648
wan2.1 image 1024: fp32
  NCDHW 1/1/4:9437184 1/1/4:9437184 1/1/4:9437184 1/1/4:9437184 1/1/4:9437184
  NDHWC 1/1/4:2752512 1/1/4:2752512 1/1/4:2752512 1/1/4:2752512 1/1/4:2752512
  triton 1/1/1:2359296 1/1/1:2359296 1/1/1:2359296 1/1/1:2359296 1/1/1:2359296
  cuda 1/1/1:2359296 1/1/1:2359296 1/1/1:2359296 1/1/1:2359296 1/1/1:2359296
"""


def expected() -> dict[tuple[str, str, str], list[str]]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for line in EXPECTED.strip().splitlines():
        if ":" in line and not line.startswith(" "):
            case, dtype = line.split(": ")
        else:
            row, *columns = line.split()
            found[case, dtype, row] = columns
    return found


def spelled(choice: Choice) -> str:
    blocks, part = choice.planned_bytes // 512, PASSES[0] // choice.pass_elements
    text = f"{choice.strips}/{choice.chunk_frames}/{part}:{blocks}"
    return f"{text}+{choice.extra_work * 1000:.0f}" if choice.strips > 1 else text


@pytest.mark.parametrize("case, dtype, row", expected())
def test_full_size_plans_stay_what_they_are(case, dtype, row):
    (config, latent), (formats, family) = CASES[case], ROWS[row]
    layers = {} if family is None else fake_layers(config, family, DTYPES[dtype])
    for memory_format in formats:
        found = [
            choose(
                PlanRequest(
                    config,
                    latent,
                    DTYPES[dtype],
                    memory_format,
                    layers,
                    None if gib is None else gib * 2**30,
                    whole_frames,
                )
            )
            for gib, whole_frames in FREE
        ]
        assert [spelled(choice) for choice in found] == expected()[case, dtype, row]
        assert all((choice.note is None) == (choice.strips == 1) for choice in found)
        assert all(sum(choice.lengths) == latent[2] for choice in found)
