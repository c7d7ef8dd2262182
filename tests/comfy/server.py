"""A real ComfyUI in a process of its own, with this pack installed as a user would have it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import websocket

from tests.comfy.provision import ComfyEnvironment
from tests.conftest import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = "ComfyUI-WanVAE"


def install_pack(custom_nodes: Path) -> Path:
    """Copy the files that git tracks (and new ones it does not ignore) into `custom_nodes`."""
    target = custom_nodes / PACK
    listed = subprocess.run(
        [
            "git",
            "-C",
            str(REPOSITORY),
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_file() and not name.startswith("tests/"):
            place = target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, place)
    return target


@dataclass
class Run:
    """What one prompt did: its websocket messages, its entry in the history, and the messages
    about its nodes that the server keeps for the panel."""

    prompt_id: str
    messages: list[dict] = field(default_factory=list)
    history: dict = field(default_factory=dict)
    kept: list[dict] = field(default_factory=list)
    previews: int = 0

    def of_type(self, kind: str) -> list[dict]:
        return [m["data"] for m in self.messages if m["type"] == kind]

    @property
    def outputs(self) -> dict:
        return self.history.get("outputs", {})

    @property
    def error(self) -> dict | None:
        errors = self.of_type("execution_error")
        return errors[0] if errors else None

    @property
    def interrupted(self) -> bool:
        return bool(self.of_type("execution_interrupted"))

    def message(self, node: str) -> dict:
        """What a page would fetch about node `node`."""
        (found,) = (message for message in self.kept if message["node"] == node)
        return found

    def report(self, node: str) -> dict:
        return self.message(node)["report"]


class Comfy:
    """Starts a server in `base`; use as a context manager.

    on_cpu: on the CPU, with one thread (the tests share a small machine); else on the GPU.
    variables: of the environment, beside those of this process.
    """

    def __init__(
        self,
        environment: ComfyEnvironment,
        base: Path,
        *flags: str,
        install: Callable[[Path], Path] = install_pack,
        on_cpu: bool = True,
        variables: Mapping[str, str] | None = None,
    ):
        self.base = base
        for folder in ("custom_nodes", "models/vae", "input", "output", "user/default"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        self.pack = install(base / "custom_nodes")
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = base / "server.log"
        self._command = [
            environment.python,
            str(Path(environment.comfyui) / "main.py"),
            "--listen",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--base-directory",
            str(base),
            "--database-url",
            "sqlite:///:memory:",
            "--disable-api-nodes",
            *flags,
        ]
        # Nothing is written to the pack.
        self._variables = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        if on_cpu:
            self._command.append("--cpu")
            # One thread a server leaves the other cores to the browser.
            self._variables["OMP_NUM_THREADS"] = "1"
        self._variables |= variables or {}

        self.last_run = Run("")

    def __enter__(self) -> Comfy:
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._variables},
            )
        try:
            self._wait_until_up()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def install_probe(self) -> None:
        """Add the probe nodes, as a pack of their own; before the server starts."""
        for name in ("probe_nodes.py", "conformance_probes.py"):
            probe = Path(__file__).with_name(name)
            shutil.copyfile(probe, self.base / "custom_nodes" / f"wan_vae_{name}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"ComfyUI ended while starting:\n{self.log_text()[-4000:]}")
            try:
                self.get("/system_stats")
            except urllib.error.HTTPError as error:  # it is up, and broken
                raise RuntimeError(f"ComfyUI: {error}:\n{self.log_text()[-4000:]}") from error
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)  # nothing tells that a foreign server is up: it must be asked
            else:
                return
        raise TimeoutError(f"ComfyUI is not up:\n{self.log_text()[-4000:]}")

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, path: str):
        with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict):
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from error
        return json.loads(text) if text else None

    def queue(self, prompt: dict, client_id: str, pnginfo: object = None) -> str:
        body: dict = {"prompt": prompt, "client_id": client_id}
        if pnginfo is not None:
            body["extra_data"] = {"extra_pnginfo": pnginfo}
        return self.post("/prompt", body)["prompt_id"]

    def run(
        self, prompt: dict, on_message=None, pnginfo: object = None, client: str | None = None
    ) -> Run:
        """Queue an API prompt, listen until it ends; `on_message(message)` sees each message.

        `pnginfo`: what a page sends as {"workflow": ...}, and an API client as it likes. `client`:
        a new one, unless one is named.
        """
        client = client or uuid.uuid4().hex
        with closing(self.listen(client)) as stream:
            run = Run(self.queue(prompt, client, pnginfo))
            self.follow(stream, run, on_message)
        asked = {"client_id": client, "prompt_id": run.prompt_id}
        for cached in run.of_type("execution_cached"):
            self.post("/wan_vae/cached", {**asked, "nodes": cached["nodes"]})
        ran = {message["node"] for message in run.of_type("wan_vae.report")}
        for done in run.of_type("executed"):
            if "wan_vae" in (done["output"] or {}) and done["node"] not in ran:
                self.post("/wan_vae/cached", {**asked, "nodes": [done["node"]]})
        run.kept = self.reports(client)
        self.last_run = run
        return run

    def reports(self, client: str) -> list[dict]:
        """What the server keeps for `client`."""
        kept: list[dict] = self.get(f"/wan_vae/reports?client_id={client}")["reports"]
        return kept

    def listen(self, client: str) -> websocket.WebSocket:
        return websocket.create_connection(
            f"ws://127.0.0.1:{self.port}/ws?clientId={client}",
            timeout=PATIENCE_S,
            # In Python this takes 3 ms for a report, in which the message behind it waits.
            skip_utf8_validation=True,
        )

    def follow(self, stream: websocket.WebSocket, run: Run, on_message=None) -> None:
        ends = {"execution_success", "execution_error", "execution_interrupted"}
        while True:
            text = stream.recv()
            if isinstance(text, bytes):
                run.previews += 1
                continue
            message = json.loads(text)
            run.messages.append(message)
            if on_message is not None:
                on_message(message)
            if message["type"] in ends and message["data"]["prompt_id"] == run.prompt_id:
                break
        # The history gets the prompt just after the last message.
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            history = self.get(f"/history/{run.prompt_id}")
            if run.prompt_id in history:
                run.history = history[run.prompt_id]
                return
            time.sleep(0.02)
        raise TimeoutError(f"prompt {run.prompt_id} never reached the history")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
