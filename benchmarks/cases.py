"""Named shapes of the benchmarks: (groups, grids, head dimension) of one layer of real models."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    groups: int  # batch * heads; windows count as batch
    q_size: tuple[int, int]
    k_size: tuple[int, int]
    head_dim: int

    @property
    def rows(self) -> int:
        return self.q_size[0] * self.q_size[1]

    @property
    def columns(self) -> int:
        return self.k_size[0] * self.k_size[1]

    def __str__(self) -> str:
        grids = "{}x{}".format(*self.q_size)
        if self.k_size != self.q_size:
            grids += " <- {}x{}".format(*self.k_size)
        return f"{self.name}: {self.groups} x {grids}, D {self.head_dim}"


CASES = {
    case.name: case
    for case in (
        Case("sam_b_global", 12, (64, 64), (64, 64), 64),
        Case("sam_h_global", 16, (64, 64), (64, 64), 80),
        Case("sam_b_windows", 25 * 12, (14, 14), (14, 14), 64),
        Case("sam_h_windows", 25 * 16, (14, 14), (14, 14), 80),
        Case("deepseek_ocr_768", 12, (48, 48), (48, 48), 64),
        Case("vitdet_oblong", 16, (50, 76), (50, 76), 64),
        Case("mvitv2_stage1", 32, (56, 56), (14, 14), 96),
    )
}
