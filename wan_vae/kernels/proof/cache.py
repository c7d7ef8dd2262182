"""The verdicts of proofs, kept in a file of this environment for the next process."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

import torch

from ...device import device_name, versions
from .prove import Verdict

SCHEMA = "wan_vae.proof/2"
# What earlier versions wrote under the same name. Their keys mean something else: such a file is
# replaced, without a note.
_OLDER_SCHEMAS = ("wan_vae.proof/1",)


def environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: the device, its driver, and the versions that make the kernel."""
    known = {k: str(v) for k, v in versions().items() if v}
    known["device"] = device_name(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known["capability"] = f"{properties.major}.{properties.minor}"
        known["multiprocessors"] = str(properties.multi_processor_count)
    return known


class ProofCache:
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
        known = self._verdicts.get(key)
        if known is None:
            known = self._verdicts[key] = prove()
            self._write()
        return known

    def __len__(self) -> int:
        return len(self._verdicts)

    def _read(self) -> dict[str, Verdict]:
        if self.path is None:
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            self.notes.append(
                f"{self.path.name} cannot be read ({error}): kernels are proven again"
            )
            return {}
        if isinstance(content, dict) and content.get("schema") in _OLDER_SCHEMAS:
            return {}
        verdicts = _parse(content, self.environment)
        if verdicts is None:
            self.notes.append(f"{self.path.name} is damaged: kernels are proven again")
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
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as f:
                    json.dump(content, f, indent=1)
                os.replace(name, self.path)
            except OSError:
                os.unlink(name)
                raise
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
    out: dict[str, Verdict] = {}
    for key, value in verdicts.items():
        if not isinstance(value, dict) or value.keys() != {"passed", "reason", "error"}:
            return None
        passed, reason, error = value["passed"], value["reason"], value["error"]
        if not isinstance(passed, bool) or not isinstance(reason, str) or passed != (not reason):
            return None
        if not (error is None or isinstance(error, float)):
            return None
        out[key] = Verdict(passed, reason, error)
    return out
