"""What patching costs: time as a ratio to one eager forward at 512x512, memory beyond the new parameters.

    python benchmarks/patch_cost.py [--threads 2] [--repeats 7] [--json]

The patch and the forward are timed in turn in one process, medians of the repeats; memory is the peak of the process during
one patch, above what it held before (Linux only, from /proc).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap

MODELS = [
    ("Unet", "resnet34"),
    ("Unet", "efficientnet-b0"),
    ("Unet", "tu-convnext_atto"),
    ("UnetPlusPlus", "resnet18"),
    ("MAnet", "resnet18"),
    ("FPN", "resnet18"),
    ("FPN", "mit_b0"),
    ("DeepLabV3Plus", "resnet18"),
    ("PAN", "resnet18"),
    ("UPerNet", "resnet18"),
    ("Segformer", "mit_b0"),
]


def seconds(function: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_megabytes(function: Callable[[], object]) -> float:
    """How far the process's resident memory rises during a call."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def measure(arch: str, encoder: str, repeats: int) -> dict[str, object]:
    """One row: medians in seconds, their ratio, and the memory of the first patch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what SMP and timm say of their own settings
        model: nn.Module = getattr(smp, arch)(encoder, encoder_weights=None, classes=3).eval()
    image = torch.randn(1, 3, 512, 512)
    first = peak_megabytes(lambda: upswap.patch(model))
    added = sum(p.numel() * p.element_size() for p in upswap.parameters(model)) / 2**20
    upswap.unpatch(model)
    patches, forwards = [], []
    with torch.no_grad():
        for _ in range(repeats):
            patches.append(seconds(lambda: upswap.patch(model)))
            upswap.unpatch(model)
            forwards.append(seconds(lambda: model(image)))
    patch, forward = statistics.median(patches), statistics.median(forwards)
    return {
        "model": f"{arch} {encoder}",
        "patch_s": round(patch, 3),
        "forward_s": round(forward, 3),
        "ratio": round(patch / forward, 2),
        "peak_mb": round(first, 1),
        "parameters_mb": round(added, 1),
    }


def main() -> None:
    """Print a row for each model, or all of them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # What the process pays once, whatever it patches, is not a model's cost.
    upswap.patch(smp.Unet("resnet18", encoder_weights=None))
    rows = []
    if not options.json:
        print(f"{'model':28} {'patch s':>8} {'forward s':>9} {'ratio':>6} {'peak MB':>8} {'new parameters MB':>18}")
    for arch, encoder in MODELS:
        row = measure(arch, encoder, options.repeats)
        rows.append(row)
        if not options.json:
            print(
                f"{row['model']:28} {row['patch_s']:8} {row['forward_s']:9} {row['ratio']:6} {row['peak_mb']:8} "
                f"{row['parameters_mb']:18}",
                flush=True,
            )
    if options.json:
        print(json.dumps({"torch": torch.__version__, "threads": options.threads, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
