"""What `upswap convert FILE` costs from process start to saved file, beside a process that only loads the file and saves it.

    python benchmarks/convert_cost.py [--arch Unet] [--encoder resnet34] [--threads 1] [--repeats 5] [--json]

Both are processes of their own, run in turn; the other one imports the host's library, `torch.load`s the file and saves the model
again. Reported are the medians, their ratio, and what the conversion's phases take in one more process: imports, loading,
looking (probe and trace), swapping, verifying, saving.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ALONE = """
import torch, segmentation_models_pytorch
torch.save(torch.load("model.pt", weights_only=False), "again.pt")
"""

PHASES = """
import json, time
marks = [("", time.perf_counter())]
def mark(name): marks.append((name, time.perf_counter()))
import torch
mark("import torch")
import segmentation_models_pytorch
mark("import the host's library")
from upswap.files import checkpoint
from upswap.surgery import apply as swapping, planning
from upswap.plan.plan import Options
from upswap.files.open_source import open_source
from upswap.surgery.checking.verification import capture_from_runs, compare
mark("import upswap")
model = open_source("model.pt").model
mark("load")
decision = planning.decide(model, None, Options())
mark("probe and trace")
before = capture_from_runs(model, decision.runs)
swapping.apply(model, decision.plan, decision.rewritings)
mark("swap")
compare(before, model).check(decision.plan)
mark("verify")
checkpoint.save(model, "phases.pt")
mark("save")
print(json.dumps({name: after - before for (_, before), (name, after) in zip(marks, marks[1:])}))
"""


def seconds(command: list[str], folder: Path, environment: dict[str, str]) -> tuple[float, str]:
    """Wall time of a process, and what it printed."""
    before = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return time.perf_counter() - before, done.stdout


def main() -> None:
    """Time both in turn and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="Unet")
    parser.add_argument("--encoder", default="resnet34")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(given.threads), "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make = (
            "import torch, segmentation_models_pytorch as smp; torch.manual_seed(0); "
            f"torch.save(smp.{given.arch}({given.encoder!r}, encoder_weights=None), 'model.pt')"
        )
        seconds([sys.executable, "-c", make], folder, environment)
        alone = [sys.executable, "-c", ALONE]
        convert = [sys.executable, "-m", "upswap", "convert", "model.pt", "-o", "out.pt", "--force"]
        times: dict[str, list[float]] = {"alone": [], "convert": []}
        for _ in range(given.repeats + 1):
            times["alone"].append(seconds(alone, folder, environment)[0])
            times["convert"].append(seconds(convert, folder, environment)[0])
        phases = json.loads(seconds([sys.executable, "-c", PHASES], folder, environment)[1])
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first warms the disk's cache
    ratio = statistics.median(one / other for one, other in zip(times["convert"][1:], times["alone"][1:], strict=True))
    if given.json:
        print(json.dumps({"seconds": medians, "ratio": ratio, "phases": phases}, indent=2))
        return
    print(f"import, load, save   {medians['alone']:.2f} s")
    print(f"upswap convert       {medians['convert']:.2f} s, {ratio:.2f} times that (the median of the rounds)")
    for name, value in phases.items():
        print(f"  {name:<26} {value:6.2f} s")


if __name__ == "__main__":
    main()
