"""Patched models in every runtime that is installed: whether they come out right, how large, and how fast beside the original.

    python benchmarks/deploy.py [--model 'smp FPN'] [--target onnxruntime] [--rounds 7] [--json rows.jsonl] [--print]

Offsets are random, of four pixels at most: a file that leaves them out would be far off. A row is a model in a target: whether
the unpatched and the patched model are right there, by the check of `upswap export`, the larger error of three inputs, nodes of
the ONNX graph, and the time of the patched file over that of the unpatched one in the same runtime: CPU time of one thread,
interleaved, the median and the quartiles of the rounds. Where the unpatched model does not come out right with sizes left open,
the row is of fixed ones.

Rows are appended to the file of --json as they are made, and one that is there is not made again, so that the same command goes
on where it stopped; without a line for a row it is made anew. A model has a process of its own. Where that dies or hangs, the row
says so, and another process goes on with the next one. --print prints the rows that are there. Exits with 1 where an unpatched
model is right and the patched one is not.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import multiprocessing
import resource
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upswap
from upswap.export.checking import Checked, compared, inputs_to_check
from upswap.export.exportable import choose
from upswap.export.flat import Flat
from upswap.export.making import Made, NamedGraph, make, named_graph
from upswap.export.options import ExportOptions
from upswap.export.runtimes import Run
from upswap.export.targets import OPSET, TARGETS, Target, check_installed, sampler_for
from upswap.probe.inputs.inputs import as_inputs

SIZE = (2, 3, 128, 160)

#: Pixels of the map, of the largest offset of every upsampler.
FARTHEST = 4.0

#: Of a cell: the file computes what the model does, and the file was written where nothing here runs it.
RIGHT, NOT_RUN = "right", "made, not run here"

#: What `offset.bias` of a static scope of 0.25 needs for a hundredth of a pixel.
HUNDREDTH = 0.04


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
    """From its YAML. Its head starts with biases beside which no map counts: here they are 0, as weights they are of size 1."""
    from ultralytics import YOLO

    model = YOLO("yolov8n.yaml").model
    head = model.model[-1]
    for branch in (*head.cv2, *head.cv3):
        last = branch[-1]
        nn.init.normal_(last.weight, std=last.in_channels**-0.5)
        nn.init.zeros_(last.bias)
    return model


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

# -- a model --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Subject:
    """A model as it was, and patched with random offsets; what was exported of it for one target, for the others."""

    original: nn.Module
    patched: nn.Module
    x: torch.Tensor
    seen: float
    """How far the output moves when one upsampler reads 0.01 pixels away, where it moves least, measured as errors are."""
    graphs: dict[tuple[bool, bool, str], NamedGraph] = dataclasses.field(default_factory=dict)

    def flat(self, target: Target, sampler: str, *, patched: bool) -> Flat:
        """The model as exporters take it, with its sampler chosen."""
        made = copy.deepcopy(self.patched if patched else self.original)
        if patched:
            choose(made, target, sampler_for(target, sampler))
        flat = Flat(made, as_inputs(self.images(target))).eval()
        flat.name_outputs([self.images(target)])
        return flat

    def images(self, target: Target) -> torch.Tensor:
        """The example: one image where the target knows no batch."""
        return self.x if target.batches else self.x[:1]

    def made(self, options: ExportOptions, folder: Path, *, patched: bool) -> Made:
        """The files; raises what exporters raise."""
        flat = self.flat(options.target, options.sampler, patched=patched)
        named = self._named(flat, options, patched=patched) if options.by_onnx else None
        return make(flat, [self.images(options.target)], options, folder / "model.onnx", named=named)

    def _named(self, flat: Flat, options: ExportOptions, *, patched: bool) -> NamedGraph:
        reader = f"{options.sampler} {options.target.rows}" if patched else ""
        key = (patched, options.open_sizes, reader)
        if key not in self.graphs:
            self.graphs[key] = named_graph(flat, [self.images(options.target)], options)
        return copy.deepcopy(self.graphs[key])


def pair(build: Callable[[], nn.Module], size: tuple[int, ...] = SIZE) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """A model as it was, and its patched copy, whose largest offset is `FARTHEST` in every upsampler; and what both take."""
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


def subject(build: Callable[[], nn.Module], size: tuple[int, ...] = SIZE) -> Subject:
    """The two, and how far the output moves with the points."""
    original, patched, x = pair(build, size)
    return Subject(original, patched, x, min(hundredths(patched, x)))


def randomised(module: Any, args: tuple[Any, ...]) -> None:
    """Give an upsampler offsets."""
    base = module.points(*args)
    for parameter in module.parameters():
        parameter.normal_()
    moved = max(float((new - old).abs().max()) for new, old in zip(module.points(*args), base, strict=True))
    for parameter in module.parameters():
        parameter.mul_(FARTHEST / moved)


def hundredths(model: nn.Module, x: torch.Tensor) -> Iterator[float]:
    """For each upsampler, the error of a model that reads 0.01 pixels away there."""
    flat = Flat(model, as_inputs(x)).eval()
    moved = copy.deepcopy(flat)
    for module in upswap.upsamplers(moved.model).values():
        bias: Any = module.offset.bias
        with torch.no_grad():
            bias.add_(HUNDREDTH)
            (row,) = compared(flat, lambda tensors: list(moved(*tensors)), [[x]], "half")
            bias.sub_(HUNDREDTH)
        yield row.error


# -- a row ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What became of a model in a target."""

    cell: str
    error: float | None = None
    rounding: float | None = None
    made: Made | None = None
    open_sizes: str | None = None
    """What went wrong where sizes were left open, if this is of fixed ones."""


def outcome(these: Subject, options: ExportOptions, folder: Path, *, patched: bool) -> Outcome:
    """The files, how they compare, and what went wrong."""
    try:
        made = these.made(options, folder, patched=patched)
    except Exception as error:  # noqa: BLE001 - a row of the table, whatever an exporter raises
        return Outcome(said(error))
    if made.run is None:
        return Outcome(NOT_RUN, made=made)
    flat = Flat(these.patched if patched else these.original, as_inputs(these.images(options.target))).eval()
    inputs = inputs_to_check(flat, as_inputs(these.images(options.target)), dynamic=options.open_sizes)
    rows: list[Checked] = list(compared(flat, made.run, inputs, "float32"))
    worst = max(rows, key=lambda row: (bool(row.problem), row.error))
    wrong = next((row for row in rows if not row.is_right("float32")), None)
    cell = RIGHT if wrong is None else wrong.problem[:100] or "wrong"
    roundings = [row.rounding for row in rows if row.rounding is not None]
    return Outcome(cell, worst.error, max(roundings, default=None), made)


def said(error: Exception) -> str:
    """The first line of an error."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:100]}"


def ratio(before: Run, after: Run, x: torch.Tensor, rounds: int) -> list[float]:
    """Quartiles of the patched file's time over the unpatched one's."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for run, kept in zip((before, after), times, strict=True):
            start = time.process_time()  # other processes take turns on the same cores
            run([x])
            if number:
                kept.append(time.process_time() - start)
    return statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)


def row(these: Subject, target: Target, sampler: str, rounds: int, stage: Callable[[str], None]) -> dict[str, Any]:
    """What is measured of a model in a runtime; `stage` is told what is being done, should it be the last."""
    options = ExportOptions(target, OPSET, None, sampler, "float32")
    begun = time.process_time()
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        stage("unpatched")
        first = outcome(these, options, Path(before), patched=False)
        if first.cell not in (RIGHT, NOT_RUN) and options.open_sizes:
            options = dataclasses.replace(options, dynamic=False)
            first = dataclasses.replace(outcome(these, options, Path(before), patched=False), open_sizes=first.cell)
        stage("patched")
        second = outcome(these, options, Path(after), patched=True)
        stage("timing")
        runs = [found.made.run for found in (first, second) if found.made is not None and found.cell == RIGHT]
        timed = None
        if len(runs) == 2 and runs[0] is not None and runs[1] is not None:
            timed = ratio(runs[0], runs[1], these.images(target), rounds)
        graphs = [None if found.made is None else found.made.graph for found in (first, second)]
        return {
            "unpatched": first.cell,
            "patched": second.cell,
            "open_sizes": first.open_sizes,
            "error_unpatched": first.error,
            "error": second.error,
            "rounding_unpatched": first.rounding,
            "rounding": second.rounding,
            "seen": these.seen,
            "nodes": [None if graph is None else len(graph.graph.node) for graph in graphs],
            "offset": FARTHEST,
            "ratio": timed,
            "ran_in": target.name if target.runs_here else "onnxruntime" if target.writes_onnx else None,
            "seconds": round(time.process_time() - begun, 1),
        }


# -- processes ------------------------------------------------------------------------------------------------------------


def work(tell: Connection, name: str, targets: Sequence[str], sampler: str, rounds: int, memory: int) -> None:
    """In a process of its own: the rows of a model. Tells ("stage", text) and ("row", target, row)."""
    resource.setrlimit(resource.RLIMIT_DATA, (memory << 30, memory << 30))  # else the whole machine runs out
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tell.send(("stage", "building"))
    these = subject(MODELS[name])
    for target in targets:
        tell.send(("begun", target))
        found = row(these, TARGETS[target], sampler, rounds, lambda text: tell.send(("stage", text)))
        tell.send(("row", target, found))


def rows_of(name: str, targets: Sequence[str], arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a model, those of processes that died or hung among them."""
    waiting = list(targets)
    context = multiprocessing.get_context("spawn")
    while waiting:
        here, there = context.Pipe(duplex=False)
        given = (there, name, waiting, arguments.sampler, arguments.rounds, arguments.memory)
        process = context.Process(target=work, args=given, daemon=True)
        process.start()
        there.close()
        stage, target = "building", waiting[0]
        while waiting:
            if not here.poll(arguments.seconds):
                process.kill()
                process.join()
                end = f"{stage}: still at it after {arguments.seconds} s"
                break
            try:
                kind, *what = here.recv()
            except EOFError:
                process.join()
                end = f"{stage}: the process ended by {ending(process.exitcode)}"
                break
            if kind == "row":
                waiting.remove(what[0])
                yield what[0], what[1]
            elif kind == "begun":
                target = what[0]
            else:
                stage = what[0]
        else:
            process.join()
            return
        waiting.remove(target)
        yield target, ended(stage, end)


def ending(code: int | None) -> str:
    """The name of the signal where it was one."""
    return signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"


def ended(stage: str, how: str) -> dict[str, Any]:
    """The row of a process that said no more. What it had said of the unpatched model is lost, but that it got past it."""
    past = stage in ("patched", "timing")
    return {
        "unpatched": "made" if past else how,
        "patched": how if past else "not tried",
        "open_sizes": None,
        "error_unpatched": None,
        "error": None,
        "rounding_unpatched": None,
        "rounding": None,
        "seen": None,
        "nodes": [None, None],
        "offset": FARTHEST,
        "ratio": None,
        "ran_in": None,
        "seconds": None,
    }


# -- the table ------------------------------------------------------------------------------------------------------------

HEAD = (
    "| model | target | sampler | unpatched | patched | error | rounding | nodes | time, patched over unpatched |",
    "|---|---|---|---|---|---|---|---|---|",
)


def line(found: dict[str, Any]) -> str:
    """A row of the table."""
    timed = found["ratio"]
    nodes = "-" if found["nodes"][1] is None else " -> ".join("-" if n is None else str(n) for n in found["nodes"])
    speed = "-" if timed is None else f"{timed[1]:.2f} ({timed[0]:.2f} to {timed[2]:.2f})"
    numbers = ("-" if found[key] is None else f"{found[key]:.0e}" for key in ("error", "rounding"))
    target = found["target"] + (", fixed sizes" if found["open_sizes"] else "")
    texts = (found["model"], target, found["sampler"], found["unpatched"], found["patched"])
    return f"| {' | '.join(text.replace('|', '/') for text in (*texts, *numbers, nodes, speed))} |"


def is_wrong(found: dict[str, Any]) -> bool:
    """Whether the patched model is worse off than the unpatched one."""
    fine = (RIGHT, NOT_RUN)
    return found["patched"] not in fine and (found["unpatched"] in fine or found["unpatched"] == "made")


def rows(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows asked for, those that the file has from there."""
    kept = [json.loads(text) for text in arguments.json.read_text().splitlines()] if arguments.json.exists() else []
    there = {(each["model"], each["target"], each["sampler"]): each for each in kept}
    samplers = {}
    for target in arguments.target or TARGETS:
        try:
            samplers[target] = sampler_for(TARGETS[target], arguments.sampler)
            if not arguments.print:
                check_installed(TARGETS[target])
        except upswap.OptionError as error:
            print(f"left out: {error}", file=sys.stderr)
            samplers.pop(target, None)
    for name in arguments.model or MODELS:
        missing = [target for target, sampler in samplers.items() if (name, target, sampler) not in there]
        yield from (there[name, target, sampler] for target, sampler in samplers.items() if target not in missing)
        for target, found in rows_of(name, () if arguments.print else missing, arguments):
            full = {"model": name, "target": target, "sampler": samplers[target], **found}
            with arguments.json.open("a") as file:
                print(json.dumps(full), file=file)
            yield full


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(MODELS))
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--sampler", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=Path("deploy.jsonl"))
    parser.add_argument("--print", action="store_true", help="make no row")
    parser.add_argument("--seconds", type=int, default=1200, help="that a step of a row may take")
    parser.add_argument("--memory", type=int, default=16, help="GiB that a row may take")
    arguments = parser.parse_args()
    print(*HEAD, sep="\n", flush=True)
    wrong = False
    for found in rows(arguments):
        print(line(found), flush=True)
        wrong |= is_wrong(found)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
