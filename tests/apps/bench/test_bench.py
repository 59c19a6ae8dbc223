"""`upswap bench`: what is counted is right, what is timed is timed in turn, and the command says what it found."""

from __future__ import annotations

import json
import resource
import struct
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import upswap
from upswap.apps.bench import allocator, meters
from upswap.apps.bench.clock import interleaved, ratio
from upswap.apps.bench.contenders import CONTENDERS, Settings
from upswap.apps.bench.flops import count
from upswap.apps.bench.models import batched, both, inputs_for
from upswap.apps.bench.upsampling import Case, sweep
from upswap.apps.cli import run
from upswap.probe.inputs.inputs import Inputs

CPU = torch.device("cpu")
X = torch.randn(2, 8, 6, 5)
DOUBLED = 2 * 8 * 12 * 10
"""Values of X at twice its size."""

UNET = "smp:unet?encoder_name=resnet18&decoder_channels=[16,8,8,8,8]"

Captured = pytest.CaptureFixture[str]


def make(name: str, channels: int, **settings: Any) -> nn.Module:
    return next(contender for contender in CONTENDERS if contender.name == name).make(Settings(channels, **settings))


def told(capsys: Captured) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- FLOPs


@pytest.mark.parametrize(
    ("mode", "forward", "backward"),
    [("nearest", 0, 1), ("nearest-exact", 0, 1), ("bilinear", 8, 8), ("bicubic", 32, 32)],
)
@pytest.mark.parametrize("how", [{"scale_factor": 2}, {"size": (12, 10)}], ids=str)
def test_flops_of_resizes(mode: str, forward: int, backward: int, how: dict[str, Any]) -> None:
    assert count(lambda x: F.interpolate(x, mode=mode, **how), X) == forward * DOUBLED
    x = X.clone().requires_grad_()
    assert count(lambda: F.interpolate(x, mode=mode, **how).sum().backward()) == (forward + backward) * DOUBLED


@pytest.mark.parametrize(
    ("mode", "forward", "to_input", "to_grid"),
    [("nearest", 0, 1, 0), ("bilinear", 8, 8, 20), ("bicubic", 32, 32, 68)],
)
def test_flops_of_sampling(mode: str, forward: int, to_input: int, to_grid: int) -> None:
    def sampled(x: Tensor, grid: Tensor) -> Tensor:
        return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False)

    grid = torch.rand(2, 12, 10, 2)
    assert count(sampled, (X, grid)) == forward * DOUBLED
    for x_wanted, grid_wanted in ((True, True), (False, True), (True, False)):
        x, points = X.clone().requires_grad_(x_wanted), grid.clone().requires_grad_(grid_wanted)
        counted = count(lambda x=x, points=points: sampled(x, points).sum().backward())
        assert counted == (forward + x_wanted * to_input + grid_wanted * to_grid) * DOUBLED


def test_flops_of_bags() -> None:
    table, bags, shares = torch.randn(7, 6), torch.randint(7, (5, 4)), torch.randn(5, 4)
    assert count(lambda: F.embedding_bag(bags, table, mode="sum")) == 5 * 4 * 6
    assert count(lambda: F.embedding_bag(bags, table, mode="mean")) == 5 * 4 * 6 + 5 * 6
    assert count(lambda: F.embedding_bag(bags, table, mode="max")) == 0
    assert count(lambda: F.embedding_bag(bags, table, mode="sum", per_sample_weights=shares)) == 2 * 5 * 4 * 6
    table.requires_grad_()
    assert count(lambda: F.embedding_bag(bags, table, mode="sum").sum().backward()) == 2 * 5 * 4 * 6
    shares.requires_grad_()
    everything = count(lambda: F.embedding_bag(bags, table, mode="sum", per_sample_weights=shares).sum().backward())
    assert everything == 3 * 2 * 5 * 4 * 6  # the sum, the gradient of the table, that of the weights


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_flops_of_dysample_are_its_convolution_and_its_sampling(layout: torch.memory_format) -> None:
    """Whether it is computed with grid_sample, or in channels_last with embedding_bag."""
    x = torch.randn(1, 64, 24, 24).contiguous(memory_format=layout)
    with torch.no_grad():
        convolution, sampling = 2 * 64 * (2 * 4 * 4) * 24 * 24, 8 * 64 * 48 * 48
        assert count(upswap.DySample(64, 2), x) == convolution + sampling
        offsets = 2 * 4 * 45 * 47
        # The field is resized to an odd size.
        assert count(upswap.DySample(64, 2), (x, (45, 47))) == convolution + 8 * 64 * 45 * 47 + 8 * offsets


@pytest.mark.parametrize(("size", "resized"), [((12, 10), 0), ((11, 9), 2 * 2 * 4 * 11 * 9)])
def test_the_operator_of_compiled_code_counts_as_eager_code_does(size: tuple[int, int], resized: int) -> None:
    field = torch.randn(2, 2 * 4 * 4, 6, 5, requires_grad=True)
    x = X.clone().requires_grad_()
    values = 2 * 8 * size[0] * size[1]

    def call() -> Tensor:
        out: Tensor = torch.ops.upswap.upsample(x, field, None, size, None, 4, [2, 2], False, "bilinear", False, False)
        return out

    assert count(call) == 8 * values + 8 * resized
    # Back: to x and to the positions, with the offsets resized once more and the gradient through that.
    assert count(lambda: call().sum().backward()) == (8 + 28) * values + 3 * 8 * resized


# ---- bytes and memory


def test_bytes_moved_by_operators() -> None:
    x, row, size = torch.randn(10, 20), torch.randn(20), 10 * 20 * 4
    moved = meters.bytes_moved
    assert moved(lambda: x * 2) == 2 * size
    assert moved(lambda: x.t().reshape(5, 40).view(-1)) == 2 * size  # one copy, views free
    assert moved(lambda: x.add_(1)) == 2 * size
    assert moved(lambda: x.add_(row)) == 2 * size + 20 * 4
    assert moved(lambda: x + torch.ones(20)) == 2 * size + 2 * 20 * 4  # made, then read
    assert moved(lambda: torch.empty(10, 20).copy_(x)) == 2 * size  # its old values are not read
    assert moved(lambda: torch.mul(x, 2, out=torch.empty(10, 20))) == 2 * size
    assert moved(lambda: x[:1].expand(10, 20).clone()) == 20 * 4 + size


def test_peak_memory_is_what_is_held_at_one_time() -> None:
    mb = 2**20

    def in_turn() -> Tensor:
        first = torch.ones(mb // 4)
        second = first + 1
        del first
        third = second + 1
        del second
        return third

    assert 2 * mb <= meters.peak_memory(in_turn, CPU) < 2.01 * mb


def test_saved_for_backward_counts_storages_once_and_leaves_known_ones_out() -> None:
    x = X.clone().requires_grad_()
    size = x.numel() * 4
    assert meters.saved_for_backward(lambda: F.interpolate(x, scale_factor=2, mode="bilinear"), [x]) == 0
    assert meters.saved_for_backward(lambda: x.relu(), [x]) == size  # its output
    assert meters.saved_for_backward(lambda: x * x, []) == size
    assert meters.saved_for_backward(lambda: x * x, [x]) == 0
    view = torch.randn(3, 2, 8, 6, 5)[0]
    assert meters.saved_for_backward(lambda: x * view, [x]) == 3 * size  # which keeps the whole


@pytest.mark.parametrize("scope", ["", "-scope"])
@pytest.mark.parametrize("style", ["lp", "pl"])
def test_dysample_saves_no_more_than_its_field_and_the_reference_does(style: str, scope: str) -> None:
    x = torch.randn(1, 32, 12, 12, requires_grad=True)
    saved = {}
    for family in ("dysample", "reference"):
        module = make(f"{family}-{style}{scope}", 32)
        known = [x, *module.parameters(), *module.buffers()]
        saved[family] = meters.saved_for_backward(lambda module=module: module(x), known)
    groups = {"lp": 4, "pl": 8}[style]
    field = 2 * groups * 4 * 12 * 12 * 4 * (2 if scope else 1)
    weights = 4 * 2 * 2 * groups * 33 if scope else 0  # offset and scope as one convolution
    assert saved["dysample"] <= field + 4 * weights
    assert saved["reference"] >= saved["dysample"]
    if style == "pl":
        shuffled = x.numel() * 4
        assert saved["reference"] >= saved["dysample"] + shuffled


@pytest.mark.skipif(allocator._glibc() is None, reason="glibc's allocator")
def test_no_page_faults_while_memory_is_kept() -> None:
    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(3):
            torch.ones(48 * 2**20 // 4)  # above the largest size that glibc by itself keeps
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with allocator.kept_memory() as kept:
        assert kept
        for _ in range(4):  # until every place where the blocks may come to lie has been touched
            faults()
        inside = faults()
    assert faults() > inside + 2 * 24  # of huge pages, of which there are 24, or of many more small ones
    assert inside < 24


# ---- time


def test_calls_are_timed_in_turn() -> None:
    log: list[str] = []
    clock = {"a": lambda: log.append("a"), "b": lambda: log.append("b")}

    def slow(name: str) -> Any:
        def call() -> None:
            torch.ones(2**20).exp_()
            clock[name]()

        return call

    times = interleaved({"a": slow("a"), "b": slow("b")}, 4, CPU)
    assert {name: len(found) for name, found in times.items()} == {"a": 4, "b": 4}
    assert all(second > 0 for found in times.values() for second in found)
    runs = [name for index, name in enumerate(log) if index == 0 or log[index - 1] != name]
    assert len(runs) >= 6  # in blocks of its own each, not one after the other


def test_ratios_are_of_the_same_round() -> None:
    """A machine that becomes ten times slower halfway changes no ratio."""
    assert ratio([2.0, 2.0, 20.0, 20.0, 9.0], [1.0, 1.0, 10.0, 10.0, 1.0]) == 2.0


# ---- the command, on upsamplers


def test_upsamplers_side_by_side(capsys: Captured) -> None:
    command = ["bench", "--shape", "1x16x8x8", "--threads", "1", "--repeats", "2", "--json"]
    assert run(command) == 0
    result = told(capsys)
    assert result["torch"] == torch.__version__
    assert result["memory_kept"] is (allocator._glibc() is not None)
    rows = {(row["contender"], row["layout"], row["what"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * (len(CONTENDERS) + 1)
    assert [row["problem"] for row in result["rows"] if row["problem"]] == []
    guided = (
        rows["fade", "contiguous", "training"]["bytes_floor"] - rows["carafe", "contiguous", "training"]["bytes_floor"]
    )
    assert guided == 3 * 16 * 256 * 4  # the guide read twice, and its gradient written
    for what in ("forward", "training"):
        base = rows["bilinear", "contiguous", what]
        assert base["ratio"] == 1
        assert base["bytes_moved"] == base["bytes_floor"] == (2 if what == "training" else 1) * 16 * (64 + 256) * 4
        assert rows["nearest", "contiguous", what]["flops"] == (16 * 256 if what == "training" else 0)
        assert rows["bilinear", "channels_last", what]["ratio"] is not None
        ours = rows["dysample-pl-scope", "contiguous", what]
        assert ours["parameters"] == 2 * (4 * 16) + 16
        assert ours["ms"] > 0
        for (_, _, of), row in rows.items():
            assert row["bytes_moved"] >= row["bytes_floor"] or "dysample" in row["contender"]
            assert row["peak_memory"] >= 16 * 256 * 4
            assert (row["saved"] is None) == (of == "forward")
    forward = rows["dysample-lp", "contiguous", "forward"]
    assert forward["bytes_floor"] == 16 * (64 + 256) * 4 + 32 * 64 * 4
    assert forward["flops"] == 2 * 16 * 32 * 64 + 8 * 16 * 256
    assert rows["carafe", "contiguous", "forward"]["flops"] > rows["conv-shuffle", "contiguous", "forward"]["flops"] / 2


def test_tables_of_markdown(capsys: Captured) -> None:
    command = ["bench", "--shape", "1x18x6x6", "--scale", "3", "--only", "*-lp", "--only", "*fade", "--threads", "1"]
    assert run([*command, "--repeats", "1", "--markdown"]) == 0
    title, blank, *lines = capsys.readouterr().out.splitlines()
    assert (title, blank) == ("1x18x6x6, scale 3, float32, threads 1:", "")
    assert len({line.count("|") for line in lines}) == 1  # as many cells in every row
    cells = {
        row[1].strip(" `"): [cell.strip() for cell in row[2:-1]] for row in (line.split("|") for line in lines[2:])
    }
    assert set(cells) == {"bilinear", "bilinear channels_last", "reference-lp", "dysample-lp", "reference-fade", "fade"}
    assert cells["bilinear"][:4] == ["0", f"{8 * 18 * 18 * 18 / 1e6:.1f}", "1.00", "1.00"]
    assert cells["fade"][0] == f"{18 * 64 * 2 + 64 + 25 * 64 * 9 + 25:,d}"
    assert cells["reference-fade"][0] == "cannot be run: OptionError: the published fade has a scale of 2, not 3"
    assert run([*command, "--markdown", "--json"]) == 2
    assert run(["bench", "smp:unet", "--markdown"]) == 2


def test_bfloat16_channels_last_and_what_cannot_be_run(capsys: Captured) -> None:
    command = ["bench", "--shape", "1x18x6x6", "--scale", "3", "--only", "*-lp", "--only", "dysample-pl"]
    command += ["--dtype", "bfloat16", "--layout", "channels_last", "--threads", "1", "--repeats", "1"]
    assert run([*command, "--groups", "6"]) == 0
    out = capsys.readouterr().out
    assert "1x18x6x6 x3, groups 6, forward, bfloat16, threads 1" in out
    assert "reference-lp channels_last cannot be run: RuntimeError" in out
    assert "dysample-lp channels_last cannot" not in out
    assert run([*command, "--json"]) == 0
    rows = {(row["contender"], row["what"]): row for row in told(capsys)["rows"] if row["layout"] == "channels_last"}
    assert (
        "4 groups" in rows["dysample-lp", "forward"]["problem"]
        or "groups=4" in rows["dysample-lp", "forward"]["problem"]
    )
    assert "groups=8" in rows["dysample-pl", "training"]["problem"]
    assert rows["dysample-pl", "training"]["ms"] is None
    assert rows["bilinear", "forward"]["bytes_moved"] == 18 * (36 + 324) * 2


@pytest.mark.parametrize(
    ("along", "found"),
    [
        ("hw", [(1, 8, 1, 2), (1, 8, 2, 4), (1, 8, 4, 8), (1, 8, 8, 16), (1, 8, 16, 32)]),
        ("channels", [(1, 1, 8, 16), (1, 2, 8, 16), (1, 4, 8, 16), (1, 8, 8, 16), (1, 16, 8, 16)]),
        ("scale", [2, 3, 4]),
        ("groups", [1, 2, 4, 8, 16]),
    ],
)
def test_sweeps(along: str, found: list[Any]) -> None:
    cases = sweep(Case((1, 8, 8, 16), "forward"), along)
    assert [getattr(case, {"scale": "scale", "groups": "groups"}.get(along, "shape")) for case in cases] == found
    assert len({case._replace(shape=(0, 0, 0, 0), scale=0, groups=0) for case in cases}) == 1


def test_a_sweep_and_its_picture(folder: Path, capsys: Captured) -> None:
    command = ["bench", "--shape", "1x8x8x8", "--sweep", "scale", "--only", "dysample-lp", "--what", "forward"]
    assert run([*command, "--threads", "1", "--repeats", "1", "--plot", "sweep.svg", "--json"]) == 0
    rows = [row for row in told(capsys)["rows"] if row["contender"] == "dysample-lp"]
    assert [row["scale"] for row in rows] == [2, 3, 4]
    assert [row["bytes_floor"] for row in rows] == [4 * 64 * (8 + 2 * 4 * n + 8 * n) for n in (4, 9, 16)]
    assert "<svg" in (folder / "sweep.svg").read_text()


def test_the_plot_is_a_picture(folder: Path, capsys: Captured) -> None:
    command = ["bench", "--shape", "1x8x8x8", "--only", "dysample-lp", "--only", "nearest", "--threads", "1"]
    assert run([*command, "--repeats", "1", "--plot", "cost.png", "--plot-against", "parameters", "--json"]) == 0
    assert len(told(capsys)["rows"]) == 2 * 4
    content = (folder / "cost.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 1.5 * height > 500  # two panels side by side
    assert content.rstrip()[-8:-4] == b"IEND"


def test_compiled_beside_eager(capsys: Captured) -> None:
    command = ["bench", "--shape", "1x4x8x8", "--only", "nearest", "--what", "forward", "--threads", "1"]
    assert run([*command, "--repeats", "1", "--compile", "--json"]) == 0
    rows = {(row["contender"], row["layout"], row["compiled"]): row for row in told(capsys)["rows"]}
    assert len(rows) == 4
    eager, compiled = (rows["nearest", "contiguous", how] for how in (False, True))
    assert compiled["ms"] > 0
    assert compiled["bytes_moved"] is None
    assert compiled["flops"] == eager["flops"]
    assert rows["bilinear", "contiguous", False]["ratio"] == 1


# ---- the command, on a model


def test_a_model_against_itself_patched(capsys: Captured) -> None:
    command = ["bench", UNET, "--input-size", "32x64", "--threads", "1", "--repeats", "1", "--style", "pl"]
    assert run([*command, "--json"]) == 0
    result = told(capsys)
    assert result["inputs"] == [[2, 3, 32, 64]]
    rows = {(row["model"], row["what"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 4
    for what in ("forward", "training"):
        original, patched = rows["original", what], rows["patched", what]
        assert not original["problem"]
        assert not patched["problem"]
        assert original["slow_down"] is None
        assert patched["slow_down"] == pytest.approx(100 * (patched["ms"] / original["ms"] - 1))
        assert 0 < patched["parameters"] - original["parameters"] < original["parameters"] / 100
        assert patched["flops"] > original["flops"]
    # Backward takes twice a forward, less the gradient of the image.
    assert 2.5 < rows["original", "training"]["flops"] / rows["original", "forward"]["flops"] < 3
    assert rows["patched", "training"]["peak_memory"] > rows["patched", "forward"]["peak_memory"]


NETS = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x, targets=None):
            if self.training and targets is None:
                raise ValueError("targets are needed in training")
            return self.last(self.up(self.first(x)))
"""


def test_a_model_that_needs_targets_is_measured_in_inference_alone(folder: Path, capsys: Captured) -> None:
    (folder / "nets_of_bench.py").write_text(textwrap.dedent(NETS))
    command = ["bench", "python:nets_of_bench:Net", "--input-size", "16", "--batch", "3"]
    assert run([*command, "--threads", "1", "--repeats", "1", "--dtype", "bfloat16", "--layout", "channels_last"]) == 0
    out = capsys.readouterr().out
    assert "inference, bfloat16, channels_last, threads 1" in out
    for model in ("original", "patched"):
        why = f"the training step of the {model} model cannot be run: ValueError: targets are needed in training"
        assert why in out


def test_both_have_the_same_weights_and_a_patched_source_is_undone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 3)).eval()
    original, patched = both(model, X[:, :3], {"style": "lp"})
    assert original is model
    assert torch.equal(original[2].weight, patched[2].weight)
    assert list(upswap.upsamplers(patched)) == ["1"]
    undone, same = both(patched, None, {})
    assert same is patched
    assert type(undone[1]) is nn.Upsample


def test_batches() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 2, 1))
    assert [tuple(tensor.shape) for tensor in inputs_for(plain, (8, 16), 3).tensors()] == [(3, 3, 8, 16)]
    with pytest.raises(upswap.InputError, match="no batch of 3 can be made; use --batch 1"):
        batched(Inputs(([torch.randn(3, 8, 8)],), {}), 3, "Listed")


# ---- what is asked wrongly


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--shape", "1x2x3"], "'1x2x3' is not a shape; write NxCxHxW"),
        (["--shape", "1x0x3x3"], "is not a shape"),
        (["--only", "dysmaple*"], "--only 'dysmaple*' matches no upsampler; there are nearest, bilinear"),
        (["--plot", "cost.gif"], "write a name that ends in .png or .svg"),
        (["--plot", "nowhere/cost.png"], "there is no folder nowhere"),
        (["--batch", "4"], "--batch is for a model; name its SOURCE"),
        (["--style", "pl"], "--style is for a model"),
        (["--upsampler", "carafe"], "--upsampler is for a model"),
        ([UNET, "--shape", "1x2x3x4"], "--shape is for upsamplers alone"),
        ([UNET, "--plot", "cost.png"], "--plot is for upsamplers alone"),
        (["--threads", "0"], "--threads"),
        (["--sweep", "depth"], "--sweep"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_a_wrong_command_line(arguments: list[str], says: str, as_json: bool, folder: Path, capsys: Captured) -> None:
    assert run(["bench", *arguments, *(["--json"] if as_json else [])]) == 2
    out, err = capsys.readouterr()
    if as_json:
        assert says in json.loads(out)["error"]
        assert err == ""
    else:
        assert says in " ".join(err.split())
        assert out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_cuda_device_is_an_error(capsys: Captured) -> None:
    assert run(["bench", "--device", "cuda"]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err


def test_no_matplotlib_is_an_error_before_anything_is_measured(
    folder: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(["bench", "--plot", "cost.png"]) == 2
    assert "pip install 'upswap[bench]'" in capsys.readouterr().err


def test_its_help_needs_no_torch() -> None:
    code = """
import sys
from upswap.apps.cli import run
code = run(["bench", "--help"])
sys.exit("torch" in sys.modules or code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "upswap bench --shape 1x256x120x120" in done.stdout
