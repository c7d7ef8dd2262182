"""`python -m wan_vae` is `wan-vae`."""

import sys

from .cli import main

sys.exit(main())
