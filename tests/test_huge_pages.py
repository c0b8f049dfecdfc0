"""Large results on a CPU are asked for in huge pages: what the system says of their memory, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import relpos_cuda
from relpos_cuda import _env

SMAPS = Path("/proc/self/smaps")
FINE, COARSE = (256, 256), (2, 2)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the system has no huge pages")
@pytest.mark.parametrize("setting", ["", "0"])
def test_which_results_are_asked_for_in_huge_pages(setting: str):
    environment = os.environ | {"PYTHONPATH": str(Path(relpos_cuda.__file__).parent.parent)}
    environment |= {_env.HUGE_PAGES.name: setting}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = dict(line.split() for line in done.stdout.splitlines())
    without = {"in_place", "small"}
    wanted = {name: str(setting == "" and name not in without) for name in answers}
    assert without < set(answers) and answers == wanted


def are_huge(t: Tensor) -> bool:
    """Whether huge pages are wanted in the middle of a tensor."""
    wanted = t.data_ptr() + t.numel() * t.element_size() // 2
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= wanted < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no memory there")


def gradients(out: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, leaves, out.detach())


def main() -> None:
    """Memory that was asked for and given back may come again: what is not asked for comes first."""
    results: dict[str, Tensor] = {}
    tables = [torch.ones(2 * FINE[0] - 1, 32)] * 2
    few, many, grid = torch.ones(1, 4, 32), torch.ones(1, 256 * 256, 32), (40, 40)
    attn, q = torch.zeros(1, 1600, 1600), torch.ones(1, 1600, 32)
    results["in_place"] = relpos_cuda.add_decomposed_rel_pos(attn, q, *tables, grid, grid, inplace=True)
    results["small"] = relpos_cuda.add_decomposed_rel_pos(torch.zeros(1, 4, 4), few, *tables, COARSE, COARSE)
    for name, t in results.items():
        print(name, are_huge(t))
    print("logits", are_huge(relpos_cuda.add_decomposed_rel_pos(attn, q, *tables, grid, grid)))
    few.requires_grad_(), many.requires_grad_()
    out = relpos_cuda.add_decomposed_rel_pos(torch.zeros(1, 256 * 256, 4), many, *tables, FINE, COARSE)
    print("dq_of_logits", are_huge(*gradients(out, [many])))
    out = relpos_cuda.rel_pos_attention(many, few, few, *tables, FINE, COARSE)
    print("out", are_huge(out))
    print("dq", are_huge(*gradients(out, [many])))
    k, v = (many.detach().clone().requires_grad_() for _ in range(2))
    out = relpos_cuda.rel_pos_attention(few, k, v, *tables, COARSE, FINE)
    for name, d in zip(("dk", "dv"), gradients(out, [k, v]), strict=True):
        print(name, are_huge(d))


if __name__ == "__main__":
    main()
