"""`python -m wan_vae` is `wan-vae`."""

import sys


def main() -> int:
    """Run the command line; returns the exit code.

    Ctrl-C during an import gives one line on stderr. So does a missing package: PyTorch, which is
    not a dependency of this package, or a dependency that was not installed with it.
    """
    try:
        from .commands.cli import main as command

        return command()
    except ModuleNotFoundError as error:
        if error.name == "torch":
            cure = "install torch for your device, or pip install -e '.[torch]'"
            print(f"wan-vae: PyTorch is missing: {cure}", file=sys.stderr)
        elif error.name in ("numpy", "safetensors", "tqdm"):
            print(f"wan-vae: {error.name} is missing: pip install {error.name}", file=sys.stderr)
        else:
            raise
        return 1
    except KeyboardInterrupt:
        print("wan-vae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
