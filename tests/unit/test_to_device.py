"""Copies to a device that go on while it computes: who waits for whom, on an imagined device."""

from __future__ import annotations

import threading
import weakref

import numpy as np
import pytest
import torch

from tests.conftest import PATIENCE_S
from wan_vae.io import staging
from wan_vae.io.image import bits
from wan_vae.io.staging import ToDevice

DEVICE = torch.device("cuda")


class Imagined:
    """Two streams, a log of which waits for the other, and copies that wait for `may_copy`."""

    def __init__(self, monkeypatch):
        self.log, self.may_copy, self.fails = [], threading.Event(), False
        self.main, self.copies = Stream(self, "main"), Stream(self, "copies")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: self.copies)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.main)
        monkeypatch.setattr(staging, "_ToDevice", lambda stream: self.move)

    def move(self, source, target):
        assert self.may_copy.wait(PATIENCE_S)
        assert target.is_contiguous() and target.shape == source.shape
        np.copyto(bits(target), bits(source))
        self.log.append("copied")
        if self.fails:
            raise RuntimeError("planted")


@pytest.fixture
def device(monkeypatch):
    device = Imagined(monkeypatch)
    yield device
    device.may_copy.set()  # threads that a failed test has left


class Stream:
    def __init__(self, device, name):
        self.device, self.name = device, name

    def wait_stream(self, other):
        self.device.log.append(f"{self.name} waits for {other.name}")


def test_a_copy_waits_for_what_was_launched_before_it_and_not_for_what_follows(device):
    """Rows of pictures, to the first rows of larger ones."""
    to_device = ToDevice(DEVICE)
    source, pictures = torch.rand(6, 1, 5, 4), torch.zeros(6, 1, 8, 4)
    to_device.begin(source, pictures[:, :, :5])
    # Nothing is copied yet, and whoever launches goes on.
    assert device.log == ["copies waits for main"] and not pictures.any()
    device.may_copy.set()
    to_device.end()
    assert device.log == ["copies waits for main", *["copied"] * 6, "main waits for copies"]
    assert torch.equal(pictures[:, :, :5], source) and not pictures[:, :, 5:].any()
    to_device.end()  # nothing was begun
    to_device.close()


def test_an_error_is_raised_when_the_copies_are_waited_for(device):
    device.fails = True
    device.may_copy.set()
    to_device = ToDevice(DEVICE)
    to_device.begin(torch.rand(2, 1, 3), torch.zeros(2, 1, 3))
    with pytest.raises(RuntimeError, match="planted"):
        to_device.end()
    # What is under way is written to memory that is freed next.
    assert device.log == ["copies waits for main", "copied", "copied", "main waits for copies"]
    to_device.close()


def test_memory_that_nobody_waits_for_is_kept_until_the_copies_are_done(device, monkeypatch):
    to_device, target = ToDevice(DEVICE), torch.zeros(2, 1, 3)
    to_device.begin(torch.rand(2, 1, 3), target)
    kept, real = weakref.ref(target), Stream.wait_stream

    def wait_stream(self, other):
        assert kept() is not None
        real(self, other)

    monkeypatch.setattr(Stream, "wait_stream", wait_stream)
    del target
    device.may_copy.set()
    to_device.close()
    assert device.log == ["copies waits for main", "copied", "copied", "main waits for copies"]
    assert kept() is None
