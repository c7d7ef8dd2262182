"""`python -m wan_vae` is `wan-vae`."""

import sys


def main() -> int:
    """Run the command; also while it is still being imported, Ctrl-C is one line."""
    try:
        from .cli import main as command

        return command()
    except KeyboardInterrupt:
        print("wan-vae: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
