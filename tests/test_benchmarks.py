"""`benchmarks/gpu.py` on a CPU: its parts in Triton's interpreter, and what it makes of what they say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu = loaded(SCRIPT)


def interpreter_works() -> bool:
    """As nn/sampling/test_triton.py has it: triton issue 9171."""
    if importlib.util.find_spec("triton") is None:
        return False
    return Version(importlib.import_module("importlib.metadata").version("triton")) >= Version("3.7")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


# -- its parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not interpreter_works(), reason="there is no triton from 3.7 on here")
@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_in_the_interpreter(part: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    done = run("--device", "cpu", "--quick", "--part", part, "--json", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    begun, *rows = map(json.loads, file.read_text().splitlines())
    assert begun["status"] == "begun"
    assert {row["status"] for row in rows} == {"timed" if part == "speed" else "right"}, rows
    assert len({row["case"] for row in rows}) == begun["cases"]
    if part in ("speed", "models"):
        low, middle, high = next(row["over_plain"] for row in rows if "over_plain" in row)
        assert 0 < low <= middle <= high
    assert done.stdout.count("no times of a GPU") == 1
    assert "The default" not in done.stdout


WRONG = """
import runpy, sys
import torch
from upswap.nn.sampling import triton_launch
right = triton_launch.forward
triton_launch.forward = lambda x, *rest: right(x, *rest) + 0.1
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.skipif(not interpreter_works(), reason="there is no triton from 3.7 on here")
@pytest.mark.parametrize("part", ["compare", "models"])
def test_kernels_that_are_wrong_are_found(part: str) -> None:
    command = [sys.executable, "-c", WRONG, str(ROOT / "benchmarks" / "gpu_parts.py"), part]
    command += ["--device", "cpu", "--quick", "--until", str(time.time() + 300)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join((str(ROOT), str(ROOT / "benchmarks")))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    rows = [row for row in map(json.loads, done.stdout.splitlines()) if row["status"] not in ("begun", "case")]
    assert rows, done.stderr
    assert {row["status"] for row in rows} == {"wrong"}
    assert all("output" in row["wrong"] for row in rows)


def test_without_a_gpu_it_says_what_can_be_run() -> None:
    before = time.monotonic()
    done = run("--part", "compare")
    assert time.monotonic() - before < 120  # the part's own time is more
    assert done.returncode == 2
    assert "no CUDA device" in done.stdout
    assert "--device cpu --quick" in done.stdout


def test_all_parts_together_end_within_nine_minutes() -> None:
    assert sum(gpu.PARTS.values()) <= gpu._ALL
    assert gpu._ALL + gpu._GRACE < 9 * 60


# -- parts that end badly -------------------------------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
def say(**row): print(json.dumps({"part": "compare", **row}), flush=True)
say(status="begun", cases=4)
for number in range(int(sys.argv[sys.argv.index("--skip") + 1]), 4):
    say(status="case", number=number, case=str(number))
    {at}
    say(status="right", case=str(number))
"""


def outcome(at: str, folder: Path, seconds: float = 60.0) -> list[tuple[str, str]]:
    """Cases and statuses, and last what a part says of itself, where what comes in place of its cases does `at`."""
    (folder / "gpu.py").write_text(SCRIPT.read_text())
    (folder / "gpu_parts.py").write_text(FAKE.replace("{at}", at))
    module = loaded(folder / "gpu.py")
    module.PARTS["compare"], module._GRACE = seconds, 0.5
    arguments = argparse.Namespace(device="cuda", quick=False)
    rows = list(module.run("compare", arguments, time.time() + 60, dict(os.environ)))
    return [(row.get("case", ""), row["status"]) for row in rows if row["status"] != "begun"]


def test_a_crash_costs_one_case(tmp_path: Path) -> None:
    right = [(str(number), "right") for number in range(4)]
    assert outcome("pass", tmp_path) == right
    for number in (0, 1, 3):
        expected = [*right[:number], (str(number), "failed"), *right[number + 1 :]]
        assert outcome(f"if number == {number}: os.abort()", tmp_path) == expected
    assert outcome("os.abort()", tmp_path) == [(str(number), "failed") for number in range(4)]


def test_a_lost_device_costs_one_case(tmp_path: Path) -> None:
    """What is wrong was said before."""
    at = "if number == 1: say(status='failed', case='1'); sys.exit(3)"
    assert [status for _, status in outcome(at, tmp_path)] == ["right", "failed", "right", "right"]


def test_a_part_that_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    assert outcome("=", tmp_path) == [("", "failed"), ("", "left out")]


def test_a_part_without_time_says_so(tmp_path: Path) -> None:
    assert outcome("pass", tmp_path, seconds=0) == [("", "left out")]
    assert outcome("if number: time.sleep(60)", tmp_path, seconds=2) == [
        ("0", "right"),
        ("1", "left out"),
        ("", "left out"),
    ]
    assert outcome("if number: sys.exit(0)", tmp_path) == [("0", "right"), ("", "left out")]


# -- the verdict ----------------------------------------------------------------------------------------------------------


def measured(ratio: float, **more: Any) -> list[dict[str, Any]]:
    spread = [ratio - 0.01, ratio, ratio + 0.01]
    rows = [{"part": part, "case": "all", "status": "right"} for part in ("compare", "determinism")]
    rows += [{"part": part, "case": "large", "status": "timed", "over_plain": [0.5, 0.6, 0.7]} for part in gpu.PARTS][
        2:
    ]
    return [*rows, {"part": "speed", "case": "small", "status": "timed", "over_plain": spread, **more}]


@pytest.mark.parametrize(
    ("rows", "device", "begins", "says"),
    [
        (measured(0.8), "cuda", "on.", "No case is slower"),
        (measured(1.02), "cuda", "on.", "3 cases"),
        (measured(1.2), "cuda", "on, but", "speed small: 1.20 (1.19 to 1.21)"),
        (measured(9.0), "cuda", "off.", "the geometric mean"),
        (measured(0.8, status="failed"), "cuda", "off:", "1 case"),
        (measured(0.8)[1:], "cuda", "none:", "compare"),
        (measured(0.8, status="left out", problem="no timm"), "cuda", "on.", "no timm"),
        (measured(0.8), "cpu", "none:", "say nothing of a GPU"),
        (measured(0.8, status="wrong"), "cpu", "off:", "1 case"),
    ],
)
def test_the_verdict(rows: list[dict[str, Any]], device: str, begins: str, says: str) -> None:
    said = gpu.verdict(rows, device)
    assert said.startswith(begins)
    assert says in said
