"""Runs one command and turns what it raises into an exit code and one line on stderr.

Exit codes: 0 done, 1 an error, 2 wrong usage, 3 some of several latents failed, 129 ended by
SIGHUP, 130 interrupted, 143 ended by SIGTERM. WAN_VAE_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from ..errors import WanVAEError
from .console import discard_stdout, escape_unencodable, is_closed_pipe, log
from .parser import parse
from .signals import Terminated, termination_raises


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    escape_unencodable()
    run = parse(argv)
    is_debugged = bool(os.environ.get("WAN_VAE_DEBUG"))
    try:
        with termination_raises():
            # Before PyTorch, which would add a warning of several lines if NumPy is missing.
            importlib.import_module("numpy")
            code = run()
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where the error of a full disk can still be reported
            return code
    except WanVAEError as error:
        if is_debugged:
            raise
        log(f"wan-vae: {error}")
        return 1
    except Terminated as ended:
        log(f"wan-vae: ended by {ended.signal.name}")
        return 128 + ended.signal
    except KeyboardInterrupt:
        log("wan-vae: interrupted")
        return 130
    except OSError as error:
        # Errors of files are raised as OutputError; what remains is stdout.
        if is_closed_pipe(error, sys.platform):
            discard_stdout()
            return 1
        if is_debugged:
            raise
        discard_stdout()
        log(f"wan-vae: {error.filename or 'standard output'}: {error.strerror or error}")
        return 1
