"""Patched models in every runtime that is installed: whether they come out right, how large, and how fast beside the original.

    python benchmarks/deploy.py [--model unet --model fpn] [--target onnxruntime] [--rounds 15] [--json rows.jsonl]

Offsets are random, of four pixels at most: a file that leaves them out would be far off. A row a model and target: whether
the unpatched and the patched model are right, the larger error of three inputs, nodes of the ONNX graph, and the time of the
patched file over that of the unpatched one in the same runtime, one thread, interleaved, the median and the quartiles of the
rounds. A row that is there already in the file of --json is not made again. Exits with 1 where an unpatched model is right
and the patched one is not.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upswap
from upswap.export.checking import allowed, compared, inputs_to_check
from upswap.export.exportable import choose
from upswap.export.flat import Flat
from upswap.export.making import Made, make
from upswap.export.options import ExportOptions
from upswap.export.runtimes import Run
from upswap.export.targets import OPSET, TARGETS, Target, check_installed, sampler_for
from upswap.probe.inputs.inputs import as_inputs

SIZE = (2, 3, 128, 160)

#: Pixels of the map, of the largest offset of every upsampler.
FARTHEST = 4.0


def smp_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    """What builds an SMP model of ResNet-18."""

    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)("resnet18", encoder_weights=None, classes=4, **options)

    return build


def segformer() -> nn.Module:
    """SegFormer-B0."""
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=4))


def torchvision_fpn() -> nn.Module:
    """The backbone of torchvision's FPN detectors."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None)


def hrnet() -> nn.Module:
    """The small one of width 18."""
    import timm

    return timm.create_model("hrnet_w18_small", features_only=True)


def yolo() -> nn.Module:
    """From its YAML."""
    from ultralytics import YOLO

    return YOLO("yolov8n.yaml").model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "smp Unet": smp_model("Unet"),
    "smp FPN": smp_model("FPN"),
    "smp UPerNet": smp_model("UPerNet"),
    "smp Segformer": smp_model("Segformer"),
    "torchvision FPN": torchvision_fpn,
    "transformers SegFormer": segformer,
    "yolov8n": yolo,
    "timm HRNet": hrnet,
}


def pair(build: Callable[[], nn.Module], size: tuple[int, ...] = SIZE) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model as it was, and patched with random offsets, the largest of `FARTHEST`."""
    torch.manual_seed(0)
    x = torch.randn(size)
    original = build().train()
    with torch.no_grad():
        for _ in range(3):  # norms with the statistics of real maps, so that outputs depend on all of the model
            original(x)
    original.eval()
    patched = upswap.patch(copy.deepcopy(original), x)
    handles = [module.register_forward_pre_hook(randomised) for module in upswap.upsamplers(patched).values()]
    with torch.no_grad():
        patched(x)  # each as it is reached, so that its input is what the ones before it give
    for handle in handles:
        handle.remove()
    return original, patched, x


def randomised(module: Any, args: tuple[Any, ...]) -> None:
    """Give an upsampler offsets."""
    base = module.points(*args)
    for parameter in module.parameters():
        parameter.normal_()
    moved = max(float((new - old).abs().max()) for new, old in zip(module.points(*args), base, strict=True))
    for parameter in module.parameters():
        parameter.mul_(FARTHEST / moved)


def flat_of(model: nn.Module, target: Target, x: torch.Tensor, sampler: str) -> Flat:
    """The model as exporters take it, with its sampler chosen."""
    made = copy.deepcopy(model)
    if upswap.is_patched(made):
        choose(made, target, sampler_for(target, sampler))
    flat = Flat(made, as_inputs(x)).eval()
    flat.name_outputs([x])
    return flat


def result(model: nn.Module, options: ExportOptions, x: torch.Tensor, folder: Path) -> tuple[Made | None, float, str]:
    """The files, the largest error, and what went wrong."""
    try:
        made = make(flat_of(model, options.target, x, options.sampler), [x], options, folder / "model.onnx")
    except Exception as error:  # noqa: BLE001 - a row of the table, whatever an exporter raises
        return None, float("nan"), f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
    if made.run is None:
        return made, float("nan"), "made, not run here"
    flat = Flat(model, as_inputs(x)).eval()
    rows = list(compared(flat, made.run, inputs_to_check(flat, as_inputs(x), dynamic=options.open_sizes), "float32"))
    error = max(row.error for row in rows)
    problem = next((row.problem for row in rows if row.problem), "")
    return made, error, problem or ("" if error <= allowed("float32", None) else "wrong")


def ratio(before: Run, after: Run, x: torch.Tensor, rounds: int) -> list[float]:
    """Quartiles of the patched file's time over the unpatched one's."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 2):
        for run, kept in zip((before, after), times, strict=True):
            start = time.perf_counter()
            run([x])
            if number >= 2:
                kept.append(time.perf_counter() - start)
    return statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)


def row(name: str, target: Target, sampler: str, rounds: int) -> dict[str, Any]:
    """A model in a runtime."""
    original, patched, x = pair(MODELS[name])
    if not target.batches:
        x = x[:1]
    options = ExportOptions(target, OPSET, None, sampler, "float32")
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        first, error_before, problem_before = result(original, options, x, Path(before))
        second, error, problem = result(patched, options, x, Path(after))
        timed = None
        if first and second and first.run and second.run and not problem_before and not problem:
            timed = ratio(first.run, second.run, x, rounds)
        return {
            "model": name,
            "target": target.name,
            "sampler": options.sampler,
            "unpatched": problem_before or "right",
            "patched": problem or "right",
            "error_unpatched": error_before,
            "error": error,
            "nodes": [
                None if made is None or made.graph is None else len(made.graph.graph.node) for made in (first, second)
            ],
            "offset": FARTHEST,
            "ratio": timed,
            "ran_in": target.name if target.runs_here else "onnxruntime" if target.writes_onnx else None,
        }


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    timed = found["ratio"]
    nodes = "-" if found["nodes"][1] is None else " -> ".join(map(str, found["nodes"]))
    speed = "-" if timed is None else f"{timed[1]:.2f} ({timed[0]:.2f} to {timed[2]:.2f})"
    error = "-" if found["error"] != found["error"] else f"{found['error']:.0e}"
    cells = (
        found["model"],
        found["target"],
        found["sampler"],
        found["unpatched"],
        found["patched"],
        error,
        nodes,
        speed,
    )
    return f"| {' | '.join(cells)} |"


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows asked for, those that the file has from there."""
    kept = [json.loads(text) for text in arguments.json.read_text().splitlines()] if arguments.json.exists() else []
    there = {(each["model"], each["target"], each["sampler"]): each for each in kept}
    for name in arguments.model or MODELS:
        for target_name in arguments.target or TARGETS:
            target = TARGETS[target_name]
            try:
                check_installed(target)
            except upswap.OptionError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            sampler = sampler_for(target, arguments.sampler)
            found = there.get((name, target_name, sampler))
            if found is None:
                found = row(name, target, arguments.sampler, arguments.rounds)
                with arguments.json.open("a") as file:
                    print(json.dumps(found), file=file)
            yield found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, default=Path("deploy.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| model | target | sampler | unpatched | patched | error | nodes | time, patched over unpatched |")
    print("|---|---|---|---|---|---|---|---|")
    wrong = False
    for found in rows(arguments):
        print(line(found), flush=True)
        wrong |= found["unpatched"] == "right" and found["patched"] not in ("right", "made, not run here")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
