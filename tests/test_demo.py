"""The demo as a user runs it, on a small image: exit codes, table, picture."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

for package in ("transformers", "skimage", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from matplotlib.image import imread  # noqa: E402
from transformers import SamVisionConfig, SamVisionModel  # noqa: E402

from relpos_cuda import _race, demo, modules  # noqa: E402


def numbers(printed: str, variant: str) -> list[list[float]]:
    """The table rows of a variant."""
    rows = [line.split(variant)[1].split() for line in printed.splitlines() if variant in line]
    return [[float(cell.rstrip("x%")) for cell in row] for row in rows]


def small_encoder(size: int, implementation: str, **config: object) -> torch.nn.Module:
    """Done in no time."""
    config = SamVisionConfig(
        image_size=size, attn_implementation=implementation, hidden_size=64, mlp_dim=64,
        num_hidden_layers=3, num_attention_heads=2, window_size=4, global_attn_indexes=[2],
    )  # fmt: skip
    with torch.device("meta"):
        return SamVisionModel(config)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder in the place of ViT-B."""
    monkeypatch.setattr(demo, "_empty_model", small_encoder)


@pytest.mark.slow
def test_the_real_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_quick_demo(tmp_path, capsys)


@pytest.mark.usefixtures("small")
def test_a_small_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_quick_demo(tmp_path, capsys)


def check_quick_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pictures" / "demo.png"
    assert demo.main(["--quick", "--device", "cpu", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "[1, 3, 256, 256] to [1, 256, 16, 16], float32, CPU" in printed and "one run" in printed
    assert str(path) in printed

    stock, sdpa, accelerated = (numbers(printed, f"  {n} ") for n in (demo.STOCK, demo.SDPA, demo.OURS))
    assert [len(stock), len(sdpa), len(accelerated)] == [2, 1, 2]  # the encoder, and the logits alone
    for seconds, _, speed_up, _, largest, relative in stock:
        assert seconds > 0 and (speed_up, largest, relative) == (1, 0, 0)
    for row in (*sdpa, *accelerated):
        assert row[0] > 0 and row[5] < 1e-4  # far from agreement looks different, see below

    picture = torch.from_numpy(imread(path))[..., :3]
    height, width, _ = picture.shape
    assert width >= 1600 and width / 4 <= height <= width / 2
    middle = picture[height // 4 : height // 2]
    for panel in middle.chunk(4, dim=1):  # something is in each quarter, and it is not the paper
        assert (panel != 1).any(dim=-1).float().mean() > 0.8
    photo, features, same_features, _ = middle.chunk(4, dim=1)
    assert photo.flatten(0, 1).std(0).min() > 0.1 and features.flatten(0, 1).std(0).min() > 0.1
    assert (features - same_features).abs().mean() < 0.05


@pytest.mark.usefixtures("small")
def test_training_at_half_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--size", "64", "--rounds", "1", "--train", "--dtype", "bfloat16", "--device", "cpu"]
    assert demo.main([*command, "--output", str(tmp_path / "demo.png")]) == 0
    printed = capsys.readouterr().out
    assert "forward + backward" in printed and "bfloat16" in printed
    assert len(numbers(printed, f"  {demo.OURS} ")) == 3


@pytest.mark.usefixtures("small")
def test_a_wrong_result_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(modules, "rel_pos_attention", lambda q, k, v, *others, **more: v)
    command = ["--size", "64", "--rounds", "1", "--device", "cpu"]
    assert demo.main([*command, "--output", str(tmp_path / "demo.png")]) == 1
    assert "differ" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["transformers", "skimage", "matplotlib", "tqdm"])
def test_a_missing_package_is_named(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert demo.main([]) == 2
    complaint = capsys.readouterr().err
    assert f"{package} is missing: pip install 'relpos_cuda[demo]'" in complaint


def test_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.main(["--size", "100"])
    assert stopped.value.code == 2
    assert "must be a positive multiple of 16, got 100" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert demo.main(["--device", "cuda"]) == 2
    assert "finds no GPU" in capsys.readouterr().err

    def exhausted(args: object) -> int:
        raise torch.OutOfMemoryError("tried to allocate too much")

    monkeypatch.setattr(demo, "_run", exhausted)
    assert demo.main(["--device", "cpu"]) == 2
    assert "smaller --size: tried to allocate too much" in capsys.readouterr().err


@pytest.mark.parametrize(("layer_seconds", "size"), [(0.1, 1024), (1.0, 1024), (2.0, 768), (4.0, 512), (1000.0, 256)])
def test_size_that_fits_our_patience(layer_seconds: float, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """12 passes of 12 layers in at most 180 seconds; half the side costs a quarter."""
    monkeypatch.setattr(demo, "measure", lambda run, device: (run(), layer_seconds, 0.0))
    encoder = SimpleNamespace(layers=[torch.nn.Identity()] * 3, pos_embed=torch.zeros(1, 2, 2, 4))
    assert demo.affordable_size(SimpleNamespace(vision_encoder=encoder), passes=12) == size


def test_peak_memory_is_what_was_allocated() -> None:
    def run() -> float:
        return torch.ones(2**24).sum().item()  # 64 MiB

    run()
    result, seconds, peak = _race.measure(run, "cpu")
    assert result == 2**24 and seconds > 0
    if peak == peak:
        assert 0.9 / 16 < peak < 1.3 / 16


def test_every_variant_runs_in_every_round() -> None:
    calls: list[str] = []

    def step(name: str) -> torch.Tensor:
        calls.append(name)
        return torch.full((2,), float(len(name)))

    steps = {name: (lambda name=name: step(name)) for name in ("stock", "ours")}
    results = _race.race("test", steps, "cpu", rounds=2)
    assert calls == ["stock", "ours", "ours", "stock", "stock", "ours"]
    assert list(results) == ["stock", "ours"]
    assert results["ours"].distance(results["stock"]) == pytest.approx((1.0, 0.2))
    assert [len(runs.seconds) for runs in results.values()] == [2, 2]
    head, first, second = _race.table("title", results).splitlines()[:3]
    assert head.startswith("title") and "1.00x" in first and "ours" in second
