"""`python -m wan_vae` is `wan-vae`."""

import sys


def main() -> int:
    """Run the command; also while it is still being imported, Ctrl-C is one line.

    So is a missing PyTorch, which no installation of this package brings by itself.
    """
    try:
        from .cli import main as command

        return command()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        print("wan-vae: PyTorch is missing: install torch for your device, or "
              "pip install -e '.[torch]'", file=sys.stderr)  # fmt: skip
        return 1
    except KeyboardInterrupt:
        print("wan-vae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
