"""The tests of this folder run in an environment with the other libraries: `make test-integrations`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

# torchvision from PyPI is built for CUDA and looks for operators of its own, which a CPU build of PyTorch cannot load.
_STAND_IN = torch.library.Library("torchvision", "FRAGMENT")
with contextlib.suppress(RuntimeError):  # the real ones are there
    _STAND_IN.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _STAND_IN.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
