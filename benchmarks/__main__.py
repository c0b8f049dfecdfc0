"""``python -m benchmarks``: the same as ``python -m relpos_cuda bench``."""

import sys

from .run import main

sys.exit(main())
