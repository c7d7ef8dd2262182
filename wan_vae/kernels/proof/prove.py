"""Proof: a fast kernel runs only where it matched the reference on this device, twice.

Some kernel configurations are wrong on some cards, and differently in each run. So before one is
used for a class of shapes, it runs twice on random data here: both results must be equal bit for
bit and close to a float32 reference. The verdict is kept in a file of this environment (GPU,
driver, torch, triton, pack version), so that the next process need not ask again.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch

from ...device import device_name, versions

SCHEMA = "wan_vae.proof/1"
# Of the largest single error, in units of the bound times the result's root mean square: rounding
# of random data stays below 8; a tile read twice or not at all is far above.
_WORST_ELEMENT = 24


@dataclass(frozen=True)
class Verdict:
    """What the proof of one kernel for one class of shapes found.

    `reason` is empty exactly when it is `right`. `error` is relative to the float32 reference.
    """

    right: bool
    reason: str = ""
    error: float | None = None


def prove(
    kernel: Callable[[], torch.Tensor],
    reference: Callable[[], torch.Tensor],
    bound: float,
    failures: tuple[type[Exception], ...] = (),
) -> Verdict:
    """Run `kernel` twice and hold it against `reference`, computed in float32 on the same inputs.

    Right means: both runs equal bit for bit, every element written and finite, relative error at
    most `bound`, no single element far off. Memory is poisoned with NaN before each run, so that
    what a kernel does not write is seen. A kernel that raises one of `failures` (it does not
    compile, or wants more shared memory than the card has) is not right; running out of device
    memory is no verdict and is raised.
    """
    expected = reference()
    try:
        first = _poisoned(kernel, expected)
        second = _poisoned(kernel, expected)
    except torch.OutOfMemoryError:
        raise
    except failures as error:
        text = str(error).strip().splitlines()
        return Verdict(False, f"{type(error).__name__}: {text[0][:160] if text else ''}")
    if first.shape != expected.shape:
        return Verdict(False, f"shape {tuple(first.shape)}, expected {tuple(expected.shape)}")
    if not bool(torch.isfinite(first).all()):
        return Verdict(False, "left elements unwritten, or NaN or inf in the result")
    different = int((first != second).sum())
    if different:
        return Verdict(False, f"two runs differ in {different} of {first.numel()} values: a race")
    difference = first.float() - expected
    error = float(difference.norm() / expected.norm())
    if not error <= bound:
        return Verdict(False, f"relative error {error:.1e}, allowed {bound:.1e}", error)
    rms = float(expected.square().mean().sqrt())
    worst = float(difference.abs().max())
    if not worst <= _WORST_ELEMENT * bound * rms:
        return Verdict(False, f"one value is off by {worst / rms:.1e} of the mean size", error)
    return Verdict(True, "", error)


def _poisoned(kernel: Callable[[], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Run `kernel` after blocks of its result's size were filled with NaN and given back.

    The caching allocator hands such a block out again for the kernel's `torch.empty`.
    """
    blocks = [torch.full_like(like, float("nan")) for _ in range(2)]
    blocks += [torch.full_like(like, float("nan"), dtype=torch.float16) for _ in range(2)]
    del blocks
    return kernel()


def environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: the device, its driver, and the versions that make the kernel."""
    found = {k: str(v) for k, v in versions().items() if v}
    found["device"] = device_name(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["multiprocessors"] = str(properties.multi_processor_count)
    return found


def cache_folder() -> Path:
    """`WAN_VAE_CACHE`, or a folder of ours in the user's cache folder. May not exist yet."""
    named = os.environ.get("WAN_VAE_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    return (Path(base) if base else Path.home() / ".cache") / "wan_vae"


class ProofBook:
    """Verdicts by key, of one environment; kept in one small JSON file if there is a folder.

    Safe under several processes: a file appears whole or not at all, and what others wrote since
    is merged before it is replaced. A file that cannot be read is as good as none, and one that
    cannot be written costs the next process a proof; both are said in `notes`.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path | None):
        """`folder` None keeps verdicts in this object only."""
        self.environment = dict(environment)
        self.notes: list[str] = []
        name = sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"proof-{name}.json"
        self._verdicts: dict[str, Verdict] = self._read()

    def verdict(self, key: str, prove: Callable[[], Verdict]) -> Verdict:
        """The verdict on `key`: the kept one, or that of `prove`, which is then kept."""
        found = self._verdicts.get(key)
        if found is None:
            found = self._verdicts[key] = prove()
            self._write()
        return found

    def __len__(self) -> int:
        return len(self._verdicts)

    def _read(self) -> dict[str, Verdict]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self.notes.append(f"{self.path.name} cannot be read ({error}): kernels are proven anew")
            return {}
        verdicts = _parse(content, self.environment)
        if verdicts is None:
            self.notes.append(f"{self.path.name} is damaged: kernels are proven anew")
            return {}
        return verdicts

    def _write(self) -> None:
        if self.path is None:
            return
        merged = self._read() | self._verdicts
        content = {
            "schema": SCHEMA,
            "environment": self.environment,
            "verdicts": {key: asdict(v) for key, v in merged.items()},
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as f:
                json.dump(content, f, indent=1)
            os.replace(name, self.path)
        except OSError as error:
            self.notes.append(f"verdicts are not kept: {error}")
            self.path = None


def _parse(content: object, environment: Mapping[str, str]) -> dict[str, Verdict] | None:
    """The verdicts in a file's JSON; None unless all of it is what `_write` writes."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    if content.get("environment") != dict(environment):
        return None
    verdicts = content.get("verdicts")
    if not isinstance(verdicts, dict):
        return None
    out = {}
    for key, value in verdicts.items():
        if not isinstance(value, dict) or value.keys() != {"right", "reason", "error"}:
            return None
        right, reason, error = value["right"], value["reason"], value["error"]
        if not isinstance(right, bool) or not isinstance(reason, str) or right != (reason == ""):
            return None
        if not (error is None or isinstance(error, float)):
            return None
        out[key] = Verdict(right, reason, error)
    return out
