"""What every results file says of itself: schema, date, device, versions and command."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from wan_vae.device import device_name, versions
from wan_vae.kernels.device import IMITATE, Device


@dataclass(frozen=True)
class Facts:
    """Where numbers come from. `versions` may grow while a run imports other decoders."""

    schema: str
    command: str
    device: str
    date: str = field(default_factory=lambda: datetime.date.today().isoformat())
    versions: dict[str, str] = field(
        default_factory=lambda: {name: found for name, found in versions().items() if found}
    )

    @classmethod
    def begin(cls, schema: str, command: str, device: torch.device) -> Facts:
        """The facts of a run that starts now on `device`."""
        card = Device.chosen_for(device)
        name = device_name(device) if card.runs_on is None else card.name
        return cls(schema, command, name)

    def lines(self) -> list[str]:
        """The head of a Markdown file."""
        found = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"- date: {self.date}",
            f"- device: {self.device}",
            f"- versions: {found}",
            f"- command: `{self.command}`",
        ]

    def as_dict(self) -> dict[str, object]:
        """The head of a JSON file."""
        return {
            "schema": self.schema,
            "date": self.date,
            "device": self.device,
            "versions": self.versions,
            "command": self.command,
        }


def repeatable(argv: Sequence[str]) -> str:
    """The command for a results file: with the card that is imitated, without --output, whose
    folder is one machine's own."""
    kept = [
        word
        for before, word in zip(["", *argv], argv, strict=False)
        if before != "--output" and word.partition("=")[0] != "--output"
    ]
    imitated = os.environ.get(IMITATE)
    start = [] if not imitated else [f"{IMITATE}={imitated}"]
    return " ".join([*start, "wan-vae bench", *kept])


def write_results(folder: Path, name: str, text: str, data: Mapping[str, object]) -> None:
    """Write `name`.md and `name`.json into `folder`, in place of those of earlier calls."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    plain = json.dumps(data, indent=1) + "\n"
    (folder / f"{name}.json").write_text(plain, encoding="utf-8")
