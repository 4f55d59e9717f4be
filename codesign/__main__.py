"""`python -m codesign`, the same as the script `jax-codesign`."""

import sys

from codesign.cli import main

sys.exit(main())
