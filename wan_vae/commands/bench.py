"""`wan-vae bench`: finds the benchmarks, which are in a clone of the repository, and runs them.

They are not part of what pip or the ComfyUI Registry installs. `wan-vae bench --share`, which needs
none of them, is `share.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import WanVAEError

_NAME = "benchmarks"
_PACK = Path(__file__).resolve().parents[2]


class BenchmarksNotFound(WanVAEError):
    """The benchmarks are not installed here."""


def run_bench(argv: Sequence[str]) -> int:
    """Run `wan-vae bench` with the words after it; returns its exit code.

    Raises BenchmarksNotFound where there is no clone of the repository.
    """
    load_benchmarks(find_benchmarks(_PACK))
    command = importlib.import_module(f"{_NAME}.suite.command")
    code: int = command.main(argv)
    return code


def find_benchmarks(pack: Path) -> Path:
    """The folder of the benchmarks in `pack`, the folder that holds `wan_vae`.

    That is a clone, on its own or in ComfyUI's `custom_nodes`. Raises BenchmarksNotFound.
    """
    folder = pack / _NAME
    # In site-packages a folder of this name is somebody else's.
    if (pack / "pyproject.toml").is_file() and (folder / "suite" / "command.py").is_file():
        return folder
    raise BenchmarksNotFound(
        f"bench: there are no benchmarks in {pack}: they need a clone of the repository "
        "(git clone, then `pip install -e '.[bench]'` in it)"
    )


def load_benchmarks(folder: Path) -> None:
    """Make `import benchmarks` mean `folder`, whatever else of that name is installed.

    Raises BenchmarksNotFound if this process has already imported another package of that name.
    """
    loaded = sys.modules.get(_NAME)
    if loaded is not None:
        found = [Path(path).resolve() for path in getattr(loaded, "__path__", [])]
        if folder.resolve() not in found:
            raise BenchmarksNotFound(
                f"bench: another package named {_NAME} is loaded, from {loaded.__file__}: "
                f"expected the one in {folder}"
            )
        return
    spec = importlib.util.spec_from_file_location(
        _NAME, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    if spec is None or spec.loader is None:
        raise BenchmarksNotFound(f"bench: {folder} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module
    spec.loader.exec_module(module)
