"""Verdicts and choices, kept in a file of this environment for the next process."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeGuard

import torch

from ...device import device_name, versions
from ...said import reworded, said, worded
from ..cache_folder import write_whole
from ..device import Device
from .choice import EAGER, Choice
from .prove import Verdict

SCHEMA = "wan_vae.proof/3"
# What earlier versions wrote under the same name. They hold less, or their keys mean something
# else: such a file is replaced, without a note.
_OLDER_SCHEMAS = ("wan_vae.proof/1", "wan_vae.proof/2")


def environment(device: torch.device) -> dict[str, str]:
    """What a verdict depends on: the device, the one that it imitates, its driver, and the versions
    that make the kernel.

    Raises BackendError as `Device.chosen_for` does.
    """
    known = {k: str(v) for k, v in versions().items() if v}
    known["device"] = device_name(device)
    card = Device.chosen_for(device)
    if card.runs_on is not None:
        known["imitates"] = card.generation
    if card.vendor == "amd":  # with it, eager is not timed
        known["miopen"] = str(torch.backends.cudnn.enabled)
    if device.type == "mps":
        known["macos"] = platform.mac_ver()[0]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        known["capability"] = f"{properties.major}.{properties.minor}"
        known["multiprocessors"] = str(properties.multi_processor_count)
    return known


@dataclass(frozen=True)
class _Kept:
    """The content of a file."""

    verdicts: dict[str, Verdict] = field(default_factory=dict)
    choices: dict[str, Choice] = field(default_factory=dict)


class ProofCache:
    """Verdicts and choices by key, of one environment; in one small JSON file if there is a folder.

    Safe under several processes: a file appears whole or not at all, and what others wrote since
    is merged before it is replaced. The choice that was written first counts, so that processes of
    one machine run the same kernels. A file that cannot be read is as good as none, and one that
    cannot be written costs the next process a proof; both are said in `notes`.
    """

    def __init__(self, environment: Mapping[str, str], folder: Path | None):
        """`folder` None keeps them in this object only."""
        self.environment = dict(environment)
        self.notes: list[str] = []
        name = sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()[:16]
        self.path = None if folder is None else folder / f"proof-{name}.json"
        # What the file held when it was like this: a file is read again if another one replaced it.
        self._seen: tuple[tuple[int, int, int], _Kept] | None = None
        # Whether verdicts wait for `gathered` to end, and whether there are any.
        self._gathers = self._has_more = False
        kept = self._read()
        self._verdicts, self._choices = dict(kept.verdicts), dict(kept.choices)

    def verdict(self, key: str, prove: Callable[[], Verdict]) -> Verdict:
        """The verdict on `key`: the kept one, or that of `prove`, which is then kept."""
        known = self._verdicts.get(key)
        if known is None:
            known = self._verdicts[key] = prove()
            self._has_more = True
            if not self._gathers:
                self._write()
        return known

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Verdicts that are found inside are written together, with a choice or at the end: each
        write is of the whole file."""
        self._gathers = True
        try:
            yield
        finally:
            self._gathers = False
            if self._has_more:
                self._write()

    def known(self, key: str) -> Verdict | None:
        """The verdict on `key` that is kept, or None."""
        return self._verdicts.get(key)

    def choice(self, key: str) -> Choice | None:
        """What runs the class of layers `key`, also if another process has chosen it since."""
        if key not in self._choices:
            theirs = self._read().choices
            self._choices = theirs | self._choices
        return self._choices.get(key)

    def keep_choice(self, key: str, choice: Choice) -> Choice:
        """Keep `choice` for `key`, unless another process was faster; returns what is kept."""
        known = self.choice(key)
        if known is None:
            known = self._choices[key] = choice
            self._write()
        return known

    @property
    def families(self) -> frozenset[str]:
        """The families of the kernels that are chosen; empty where nothing is."""
        winners = {choice.winner for choice in self._choices.values()} - {EAGER}
        # A proof key begins with the family.
        return frozenset(winner.partition(" ")[0] for winner in winners)

    def __len__(self) -> int:
        return len(self._verdicts)

    def _read(self) -> _Kept:
        """What the file holds, also if another process has written it since."""
        if self.path is None:
            return _Kept()
        now = _identity(self.path)
        if now is None or self._seen is None or self._seen[0] != now:
            kept = self._parsed(self.path)
            # Of before it was read: one that was replaced meanwhile is read again.
            self._seen = None if now is None else (now, kept)
            return kept
        return self._seen[1]

    def _parsed(self, path: Path) -> _Kept:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return _Kept()
        except (OSError, ValueError, RecursionError) as error:
            self._note(
                said(
                    "proof.unreadable",
                    "{file} cannot be read ({error}): kernels are proven again",
                    file=path.name,
                    error=error,
                )
            )
            return _Kept()
        if isinstance(content, dict) and content.get("schema") in _OLDER_SCHEMAS:
            return _Kept()
        kept = _parse(content, self.environment)
        if kept is None:
            self._note(
                said("proof.damaged", "{file} is damaged: kernels are proven again", file=path.name)
            )
            return _Kept()
        return kept

    def _note(self, text: str) -> None:
        if text not in self.notes:  # the same file may be read several times
            self.notes.append(text)

    def _write(self) -> None:
        self._has_more = False
        if self.path is None:
            return
        theirs = self._read()
        verdicts = theirs.verdicts | self._verdicts
        choices = self._choices | theirs.choices
        reasons = [verdict.reason for verdict in verdicts.values()]
        reasons += [reason for choice in choices.values() for reason in choice.refused.values()]
        content = {
            "schema": SCHEMA,
            "environment": self.environment,
            "verdicts": {key: asdict(v) for key, v in verdicts.items()},
            "choices": {key: asdict(c) for key, c in choices.items()},
            "worded": worded(reasons),
        }
        try:
            write_whole(self.path, json.dumps(content, indent=1).encode())
        except OSError as error:
            self._note(said("proof.not_kept", "verdicts are not kept: {error}", error=error))
            self.path = None


def _identity(path: Path) -> tuple[int, int, int] | None:
    """Tells a file from the one that replaces it; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _parse(content: object, environment: Mapping[str, str]) -> _Kept | None:
    """The verdicts and choices in a file's JSON; None unless all of it is what `_write` writes."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return None
    if content.get("environment") != dict(environment):
        return None
    verdicts, choices = content.get("verdicts"), content.get("choices")
    # Files of earlier versions have no words.
    words = content.get("worded", {})
    if not isinstance(verdicts, dict) or not isinstance(choices, dict) or not _are_words(words):
        return None
    kept = _Kept()
    for key, value in verdicts.items():
        verdict = _verdict(value, words)
        if verdict is None:
            return None
        kept.verdicts[key] = verdict
    for key, value in choices.items():
        choice = _choice(value, words)
        if choice is None:
            return None
        kept.choices[key] = choice
    return kept


def _are_words(words: object) -> TypeGuard[dict[str, dict[str, Any]]]:
    """Whether `words` are what `worded` makes: a sentence is longer than each sentence in it."""
    if not isinstance(words, dict):
        return False
    for sentence, known in words.items():
        match known:
            case {"key": str(), "values": dict(values)} if all(
                isinstance(value, str) and len(value) < len(sentence) for value in values.values()
            ):
                continue
        return False
    return True


def _verdict(value: object, words: dict[str, dict[str, Any]]) -> Verdict | None:
    if not isinstance(value, dict) or value.keys() != {"passed", "reason", "error"}:
        return None
    passed, reason, error = value["passed"], value["reason"], value["error"]
    if not isinstance(passed, bool) or not isinstance(reason, str) or passed != (not reason):
        return None
    if not (error is None or isinstance(error, float)):
        return None
    return Verdict(passed, reworded(reason, words), error)


def _choice(value: object, words: dict[str, dict[str, Any]]) -> Choice | None:
    if not isinstance(value, dict) or value.keys() != {"winner", "times_ms", "refused"}:
        return None
    winner, times, refused = value["winner"], value["times_ms"], value["refused"]
    if not isinstance(times, dict) or not isinstance(refused, dict):
        return None
    if winner not in times or not all(isinstance(ms, float) and ms >= 0 for ms in times.values()):
        return None
    if not all(isinstance(reason, str) for reason in refused.values()):
        return None
    return Choice(winner, times, {key: reworded(reason, words) for key, reason in refused.items()})
