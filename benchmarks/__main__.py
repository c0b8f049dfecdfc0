"""``python -m benchmarks``: the measured rows of the README."""

import sys

from .logits import main

sys.exit(main())
