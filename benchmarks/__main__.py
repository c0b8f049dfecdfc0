"""``python -m benchmarks``: the measured rows of the README."""

import sys

from .run import main

sys.exit(main())
