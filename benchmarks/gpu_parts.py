"""One part of `gpu.py`, in a process of its own: what a kernel does to the device then ends one part and not the others.

    python benchmarks/gpu_parts.py PART --device cuda --until TIME [--quick] [--skip N]

Rows are JSON lines on stdout, the first with the number of cases. After `--until`, in seconds since the epoch, no case begins.
Exits with `LOST` where the device takes no more calls, so that another process has to go on with the next case, and with
`NOTHING` where there is no device.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from deploy import MODELS, pair

import upswap
from triton_reference import HALVES, MAPPINGS, STRIDES, make, reference, target_of
from upswap.apps.bench.clock import interleaved, quartiles
from upswap.apps.bench.contenders import BASELINE, Settings, contenders
from upswap.apps.bench.models import ModelBench
from upswap.apps.bench.setting import FORWARD, LAYOUTS, TRAINING, environment, problem_of
from upswap.apps.bench.upsampling import Case, Tensors, step
from upswap.nn.dysample import DySample
from upswap.nn.sampling import triton_launch
from upswap.nn.sampling.positions import Mapping, Reading, Scheme
from upswap.nn.sampling.sampler import upsample
from upswap.probe.dataflow import tensors_in
from upswap.probe.inputs.inputs import as_inputs

LOST, NOTHING = 3, 4

Row = dict[str, Any]
Run = Callable[[], Iterable[Row]]

_ROUNDS, _QUICK_ROUNDS = 15, 2
_FLOAT32, _BFLOAT16 = "float32", "bfloat16"


class Place(NamedTuple):
    """Where a part runs, and whether with few and small cases."""

    device: torch.device
    quick: bool

    @property
    def rounds(self) -> int:
        """How often things are timed in turn."""
        return _QUICK_ROUNDS if self.quick else _ROUNDS


# -- the switch between kernels and plain path ----------------------------------------------------------------------------


def switch(on: bool) -> None:
    """The kernels for the calls that follow, backward passes too, or the plain path."""
    os.environ["UPSWAP_TRITON"] = "1" if on else "0"


class Switched(nn.Module):
    """A module whose calls switch first. Its backward pass has to come before the next switch."""

    def __init__(self, module: nn.Module, on: bool) -> None:
        super().__init__()
        self.module, self.on = module, on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives."""
        switch(self.on)
        return self.module(*args, **kwargs)


@contextlib.contextmanager
def launches() -> Iterator[mock.Mock]:
    """Counts calls of the forward kernel: a path that was not taken must not pass for one that is right."""
    with mock.patch.object(triton_launch, "forward", wraps=triton_launch.forward) as counted:
        yield counted


def largest(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def overall(got: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    """The norm of the differences over that of the values, the worst of some tensors."""
    norms = (
        (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-9) for a, b in zip(got, expected, strict=True)
    )
    return max(norm.item() for norm in norms)


# -- compare --------------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call of the kernels."""

    shape: tuple[int, int, int, int]
    scheme: Scheme
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    field_dtype: torch.dtype = torch.float32
    field_size: tuple[int, int] | None = None
    factors: tuple[float, float] | None = None
    strided: tuple[str, str] | None = None
    """x or field, and one of `STRIDES`."""

    def __str__(self) -> str:
        kinds = (self.dtype, self.field_dtype)
        mapping, cells = self.scheme.mapping.describe(), "x".join(map(str, self.scheme.cells))
        words = [
            "x".join(map(str, self.shape)),
            f"groups {self.scheme.groups} cells {cells} {mapping}",
            *(["scope"] if self.scheme.scope else []),
            "/".join(str(kind).removeprefix("torch.") for kind in kinds),
            self.layout,
            *([f"factors {self.factors}"] if self.factors else []),
            *(self.strided or ()),
        ]
        return " ".join(words)

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """x, field and a gradient."""
        made = make(
            self.shape,
            self.scheme,
            field_size=self.field_size,
            factors=self.factors,
            channels_last=self.layout == "channels_last",
            dtype=self.dtype,
            field_dtype=self.field_dtype,
        )
        x, field, grad = (tensor.to(device) for tensor in made)
        if self.strided:
            which, how = self.strided
            x, field = (STRIDES[how](t) if which == name else t for name, t in (("x", x), ("field", field)))
        return x, field, grad

    def limit(self, dtype: torch.dtype) -> float:
        """As in the tests, and what a position far from 0 loses in float32: its last bit, times the slope there."""
        if dtype in HALVES:
            return 2 * torch.finfo(dtype).eps
        return 2e-5 + 2 * torch.finfo(torch.float32).eps * max(*self.shape[2:])


_DTYPES = [(torch.float32, torch.float32), *((half, kind) for half in HALVES for kind in (torch.float32, half))]


def calls(quick: bool) -> Iterator[Call]:
    """All variants, dtypes and layouts at one shape, then other shapes and strides."""
    if quick:
        shape, variants = (1, 4, 3, 4), zip((False, True, False, True), MAPPINGS, strict=True)
        for (scope, mapping), layout, kinds in zip(variants, [*LAYOUTS, *LAYOUTS], _DTYPES[1:], strict=True):
            yield Call(shape, Scheme(2, (2, 2), scope, mapping), layout, *kinds)
        yield Call(shape, Scheme(1, (2, 1), True, MAPPINGS[0]), strided=("x", "cropped"))
        return
    for scope, mapping, layout, kinds in itertools.product((False, True), MAPPINGS, LAYOUTS, _DTYPES):
        yield Call((2, 64, 24, 37), Scheme(4, (2, 2), scope, mapping), layout, *kinds)
    usual = functools.partial(Scheme, scope=False, mapping=Mapping("bilinear"))
    others = [
        ((1, 256, 8, 8), usual(4, (2, 2)), None, None),
        ((2, 20, 33, 18), usual(4, (2, 2)), None, None),
        ((1, 64, 40, 52), usual(8, (3, 2), scope=True), None, None),
        ((4, 128, 56, 56), usual(4, (2, 2)), None, None),
        ((2, 32, 17, 23), usual(2, (1, 1)), (40, 51), None),
        ((2, 32, 16, 22), usual(2, (1, 1)), (24, 33), (1.5, 1.5)),
        ((1, 3, 1, 7), usual(1, (4, 4), scope=True), None, None),
    ]
    for (shape, scheme, size, factors), layout, kind in itertools.product(
        others, LAYOUTS, (torch.float32, torch.bfloat16)
    ):
        yield Call(shape, scheme, layout, kind, torch.float32, size, factors)
    for which, how, layout in itertools.product(("x", "field"), STRIDES, LAYOUTS):
        yield Call((2, 64, 24, 37), usual(4, (2, 2)), layout, strided=(which, how))


def kernels_compared(call: Call, place: Place) -> Iterator[Row]:
    """Output and gradients, of sums in any order and of deterministic ones, against float64 by torch's own sampler."""
    x, field, grad = call.tensors(place.device)
    scheme, factors = call.scheme, call.factors
    leaves = x.detach().clone().requires_grad_(), field.detach().clone().requires_grad_()
    expected = reference(*leaves, scheme, factors)
    of_x, of_field = torch.autograd.grad(expected, leaves, grad.double())

    def plain() -> tuple[Tensor, Tensor, Tensor]:
        switch(False)
        inputs = x.detach().clone().requires_grad_(), field.detach().float().requires_grad_()
        out = upsample(*inputs, Reading(target_of(field, scheme), factors, scheme))
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    before = time.perf_counter()
    got = {"output": (triton_launch.forward(x, field, scheme, factors), expected.detach(), x.dtype)}
    for deterministic in (False, True):
        both = triton_launch.backward(grad, x, field, scheme, factors, deterministic=deterministic, needs=(True, True))
        name = "deterministic gradient" if deterministic else "gradient"
        got |= {f"{name} of x": (both[0], of_x, x.dtype), f"{name} of field": (both[1], of_field, field.dtype)}
    _wait(place.device)
    first = time.perf_counter() - before
    errors = {name: largest(value, wanted) for name, (value, wanted, _) in got.items()}
    # Written so that NaN is wrong.
    wrong = [name for name, (_, _, kind) in got.items() if not errors[name] <= call.limit(kind)]
    wrong += [f"dtype of {name}" for name, (value, _, kind) in got.items() if value.dtype != kind]
    yield {
        "group": f"kernels {str(call.dtype).removeprefix('torch.')} {call.layout}",
        "status": "wrong" if wrong else "right",
        "wrong": wrong,
        "error": max(errors.values()),
        "errors": errors,
        "of_limit": max(errors[name] / call.limit(kind) for name, (_, _, kind) in got.items()),
        "plain_error": max(map(largest, plain(), (expected.detach(), of_x, of_field))),
        "first_s": first,
    }


_HOWS: dict[str, dict[str, Any]] = {"x2": {}, "to 45x70": {"size": (45, 70)}, "x2.5": {"scale_factor": 2.5}}


def modules_compared(options: dict[str, Any], how: str, layout: str, dtype: str, place: Place) -> Iterator[Row]:
    """A module by the kernels and by the plain path: that the kernels are given what it means.

    Gradients are compared by norms: where a point lies on a pixel's centre but for rounding, that of its offset jumps.
    """
    torch.manual_seed(0)
    channels, size = (8, (3, 4)) if place.quick else (64, (20, 31))
    module = DySample(channels, 2, groups=2 if place.quick else 4, **options).to(place.device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(1 if place.quick else 2, channels, *size).to(place.device)
    x = x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    arguments = {"size": (7, 9)} if place.quick and "size" in _HOWS[how] else _HOWS[how]

    def outcome(on: bool) -> list[Tensor]:
        switch(on)
        with Case(tuple(x.shape), TRAINING, dtype=dtype).autocast(place.device):
            out = module(x, **arguments)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
        return [out.detach(), *torch.autograd.grad((out * weights).sum(), [x, *module.parameters()])]

    expected = outcome(False)
    with launches() as counted:
        got = outcome(True)
    error, gradients = overall(got[:1], expected[:1]), overall(got[1:], expected[1:])
    limits = (1e-4, 0.03) if dtype == _FLOAT32 else (0.01, 0.05)
    wrong = [
        name
        for name, e, limit in zip(("output", "gradients"), (error, gradients), limits, strict=True)
        if not e <= limit
    ]
    if counted.call_count != 1:
        wrong.append("the kernels were not launched")
    yield {
        "group": f"modules {dtype} {layout}",
        "status": "wrong" if wrong else "right",
        "wrong": wrong,
        "error": error,
        "errors": {"output": error, "gradients": gradients},
        "of_limit": max(error / limits[0], gradients / limits[1]),
    }


def far_compared(place: Place) -> Iterator[Row]:
    """A batch of more than 2^31 numbers: its last image as that image alone."""
    if torch.cuda.mem_get_info(place.device)[0] < 24 * 2**30:
        yield {"group": "large", "status": "left out", "problem": "needs 24 GiB of free memory"}
        return
    scheme = Scheme(4, (2, 2), False, Mapping("bilinear"))
    generator = torch.Generator(place.device).manual_seed(0)
    x, field = (
        torch.randn(33, n, 512, 512, device=place.device, dtype=torch.float16, generator=generator) for n in (64, 32)
    )
    whole = triton_launch.forward(x, field, scheme, None)
    alone = triton_launch.forward(x[-1:].clone(), field[-1:].clone(), scheme, None)
    wrong = [] if torch.equal(whole[-1:], alone) else ["output"]
    _, of_field = triton_launch.backward(whole, x, field, scheme, None, deterministic=False, needs=(False, True))
    _, of_one = triton_launch.backward(
        alone, x[-1:].clone(), field[-1:].clone(), scheme, None, deterministic=False, needs=(False, True)
    )
    wrong += [] if torch.equal(of_field[-1:], of_one) else ["gradient of field"]
    yield {"group": "large", "status": "wrong" if wrong else "right", "wrong": wrong}


def compare(place: Place) -> list[tuple[str, Run]]:
    """The kernels against float64, and modules by them against modules by the plain path."""
    found: list[tuple[str, Run]] = [
        (str(call), functools.partial(kernels_compared, call, place)) for call in calls(place.quick)
    ]
    variants = [
        {"style": style, "dyscope": scope, "mode": mode}
        for style, scope, mode in itertools.product(("lp", "pl"), (False, True), ("bilinear", "nearest"))
    ]
    settings = list(itertools.product(variants, _HOWS, LAYOUTS, (_FLOAT32, _BFLOAT16)))
    for options, how, layout, dtype in settings[::61] if place.quick else settings:
        words = [options["style"], *(["scope"] if options["dyscope"] else []), options["mode"]]
        name = f"DySample {' '.join(words)} {how} {layout} {dtype}"
        found.append((name, functools.partial(modules_compared, options, how, layout, dtype, place)))
    if place.device.type == "cuda" and not place.quick:
        found.append(("33x64x512x512 float16", functools.partial(far_compared, place)))
    # Should time run out, what was compared is a sample of all.
    random.Random(0).shuffle(found)
    return found


# -- determinism ----------------------------------------------------------------------------------------------------------


def repeated(call: Call, place: Place) -> Iterator[Row]:
    """The same call again: the same bits, where torch is asked for deterministic algorithms."""
    x, field, grad = call.tensors(place.device)
    # Most points in the border, where many add to one pixel.
    field *= 10
    switch(True)

    def runs(deterministic: bool) -> list[tuple[Tensor, ...]]:
        torch.use_deterministic_algorithms(deterministic)
        found = []
        for _ in range(2 if place.quick else 6):
            inputs = x.detach().clone().requires_grad_(), field.detach().clone().requires_grad_()
            out = upsample(*inputs, Reading(target_of(field, call.scheme), None, call.scheme))
            found.append((out.detach(), *torch.autograd.grad(out, inputs, grad)))
        torch.use_deterministic_algorithms(False)
        return found

    def differing(found: list[tuple[Tensor, ...]]) -> list[str]:
        names = ("output", "gradient of x", "gradient of field")
        return [
            name
            for name, *values in zip(names, *found, strict=True)
            if not all(torch.equal(values[0], v) for v in values)
        ]

    with launches() as counted:
        wrong = differing(runs(True))
    if not counted.call_count:
        wrong.append("the kernels were not launched")
    yield {
        "group": "determinism",
        "status": "wrong" if wrong else "right",
        "wrong": wrong,
        "varies_without": differing(runs(False)),
    }


def determinism(place: Place) -> list[tuple[str, Run]]:
    """Calls to repeat."""
    shape = (1, 4, 3, 4) if place.quick else (4, 64, 64, 64)
    settings = itertools.product((False, True), LAYOUTS, (torch.float32,) if place.quick else (torch.float32, *HALVES))
    found = [Call(shape, Scheme(2, (2, 2), scope, MAPPINGS[0]), layout, kind) for scope, layout, kind in settings]
    return [(str(call), functools.partial(repeated, call, place)) for call in (found[-1:] if place.quick else found)]


# -- speed ----------------------------------------------------------------------------------------------------------------

_OURS = "dysample-"


def contestants(place: Place) -> Iterator[tuple[str, Callable[[Settings], nn.Module]]]:
    """Those of `upswap bench`, DySample twice."""
    for contender in contenders([BASELINE, "nearest", "carafe", "reference-*", f"{_OURS}*"]):
        if place.quick and "-" in contender.name and not contender.name.endswith("-lp"):
            continue
        if not contender.name.startswith(_OURS):
            yield contender.name, contender.make
            continue
        for on, path in ((False, "plain"), (True, "triton")):
            yield f"{contender.name} {path}", lambda s, make=contender.make, on=on: Switched(make(s), on)


def upsamplers_timed(case: Case, layout: str, place: Place) -> Iterator[Row]:
    """Every upsampler at one shape, in turn."""
    rows: dict[str, Row] = {}
    steps: dict[str, Callable[[], object]] = {}
    with case.autocast(place.device):
        tensors = Tensors(case, place.device)
        x = tensors.inputs[layout]
        for name, make_it in contestants(place):
            if name.startswith("reference") and layout == "channels_last":
                continue  # the formula is written for contiguous maps
            rows[name] = {"contender": name, "status": "timed"}
            try:
                module = (
                    make_it(Settings(case.shape[1], case.scale, case.groups))
                    .to(x.device)
                    .to(memory_format=LAYOUTS[layout])
                )
                call = step(functools.partial(module, x), (x, *module.parameters()), tensors, case.what)
                with launches() as counted:
                    call()
                if bool(counted.call_count) != name.endswith("triton"):
                    raise RuntimeError(f"the kernels were launched {counted.call_count} times")
                steps[name] = call
            except Exception as error:  # noqa: BLE001 - one must not stop the others
                _wait(place.device)  # which raises where the device is lost
                ours = name.startswith(_OURS)
                rows[name] |= {"status": "failed" if ours else "left out", "problem": problem_of(error)}
        times = interleaved(steps, place.rounds, place.device)
    for name, row in rows.items():
        if name not in times:
            yield row
            continue
        row["ms"] = statistics.median(times[name]) * 1e3
        others = {"over_bilinear": BASELINE}
        if name.startswith(_OURS):
            own, _, path = name.removeprefix(_OURS).partition(" ")
            others["over_reference"] = f"reference-{own}"
            if path == "triton":
                others["over_plain"] = f"{_OURS}{own} plain"
        row |= {key: quartiles(times[name], times[other]) for key, other in others.items() if other in times}
        yield row


def speed(place: Place) -> list[tuple[str, Run]]:
    """Upsamplers side by side: bfloat16 and float32, the layout that each is used with first."""
    shapes = [(8, 128, 56, 56), (1, 256, 120, 120), (2, 64, 128, 128), (16, 256, 32, 32), (1, 256, 16, 16)]
    settings = [
        (_BFLOAT16, "channels_last"),
        (_FLOAT32, "contiguous"),
        (_BFLOAT16, "contiguous"),
        (_FLOAT32, "channels_last"),
    ]
    if place.quick:
        shapes, settings = [(1, 4, 2, 2)], settings[:2]
    found: list[tuple[str, Run]] = []
    for (dtype, layout), shape, what in itertools.product(settings, shapes, (TRAINING, FORWARD)):
        if place.quick and (what == TRAINING) != (dtype == _FLOAT32):
            continue
        case = Case(shape, what, groups=1 if place.quick else None, dtype=dtype)
        name = f"{'x'.join(map(str, shape))} {what} {dtype} {layout}"
        found.append((name, functools.partial(upsamplers_timed, case, layout, place)))
    return found


# -- models ---------------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    """What the interpreter takes a second for."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=16, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(8, 2, 1),
    )


_MODELS = ("smp Unet", "smp FPN", "smp UPerNet", "smp Segformer", "timm HRNet", "transformers SegFormer")


@functools.lru_cache(maxsize=1)
def prepared(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The original, patched and untrained, and patched with offsets of some pixels."""
    build, size = (tiny, (2, 3, 64, 64)) if name == "tiny" else (MODELS[name], (2, 3, 128, 160))
    original, patched, x = pair(build, size)
    return original, upswap.patch(copy.deepcopy(original), x), patched


def models_timed(name: str, what: str, dtype: str, layout: str, place: Place) -> Iterator[Row]:
    """A model as it was, patched by the plain path, and patched by the kernels, in turn."""
    row: Row = {"model": name, "what": what, "dtype": dtype, "layout": layout}
    try:
        original, untrained, patched = prepared(name)
    except ImportError as error:
        yield row | {"status": "left out", "problem": problem_of(error)}
        return
    bench = ModelBench(dtype, layout, device=place.device)
    torch.manual_seed(0)
    given = as_inputs(torch.randn((1, 3, 64, 64) if place.quick else (8, 3, 512, 512))).map(bench.placed)

    def outputs(model: nn.Module, on: bool) -> list[Tensor]:
        switch(on)
        found = bench.call(model, model, given, FORWARD)()
        return [tensor for tensor in tensors_in(found) if tensor.is_floating_point()]

    for model in (original, untrained, patched):
        bench.module(model, FORWARD)
    with launches() as counted:
        error = overall(outputs(patched, True), outputs(patched, False))
    step0 = overall(outputs(untrained, True), outputs(original, True))
    # Convolutions round to TF32 or bfloat16, and what differs in a last bit before that differs by more afterwards.
    limit = 5e-3 if dtype == _FLOAT32 else 0.05
    wrong = [key for key, e in (("output", error), ("step 0", step0)) if not e <= limit]
    wrong += [] if counted.call_count else ["the kernels were not launched"]
    row |= {"status": "wrong" if wrong else "right", "wrong": wrong, "error": error, "step0": step0}

    # Of copies: training moves the statistics that the next case compares with.
    original, patched = (bench.module(copy.deepcopy(model), what) for model in (original, patched))
    steps = {"original": bench.call(original, original, given, what)}
    for path, on in (("plain", False), ("triton", True)):
        steps[path] = bench.call(Switched(patched, on), patched, given, what)
    times = interleaved(steps, place.rounds, place.device)
    yield row | {
        "ms": {key: statistics.median(seconds) * 1e3 for key, seconds in times.items()},
        "plain_over_original": quartiles(times["plain"], times["original"]),
        "triton_over_original": quartiles(times["triton"], times["original"]),
        "over_plain": quartiles(times["triton"], times["plain"]),
    }


def models(place: Place) -> list[tuple[str, Run]]:
    """Whole models at 512x512, eight images."""
    names = ("tiny",) if place.quick else _MODELS
    settings = itertools.product(names, ((_BFLOAT16, "channels_last"), (_FLOAT32, "contiguous")), (TRAINING, FORWARD))
    if place.quick:
        settings = itertools.islice(settings, 2, 3)
    return [
        (f"{name} {what} {dtype} {layout}", functools.partial(models_timed, name, what, dtype, layout, place))
        for name, (dtype, layout), what in settings
    ]


# -- the process ----------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Place], list[tuple[str, Run]]]] = {
    "compare": compare,
    "determinism": determinism,
    "speed": speed,
    "models": models,
}


def _wait(device: torch.device) -> None:
    """Until the device has done what it was given; raises what went wrong there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows(run: Run, device: torch.device) -> Iterator[Row]:
    """Those of a case, or that it failed."""
    try:
        yield from run()
        _wait(device)
    except Exception as error:  # noqa: BLE001 - one case must not stop the others
        yield {"status": "failed", "problem": problem_of(error)}


def main() -> int:
    """Print the rows of a part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--skip", type=int, default=0)
    arguments = parser.parse_args()
    # Lines of others, libraries' and triton's, go elsewhere.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(row: Row) -> None:
        print(json.dumps({"part": arguments.part, **row}), file=lines, flush=True)

    if arguments.device == "cuda" and not torch.cuda.is_available():
        say({"status": "no device", "problem": "torch finds no CUDA device here"})
        return NOTHING
    if importlib.util.find_spec("triton") is None:
        say({"status": "no device", "problem": "there is no triton here"})
        return NOTHING
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 if arguments.device == "cpu" else torch.get_num_threads())
    place = Place(torch.device(arguments.device), arguments.quick)
    cases = PARTS[arguments.part](place)
    say(
        {
            "status": "begun",
            "cases": len(cases),
            "triton": metadata.version("triton"),
            **environment(place.device, False),
        }
    )
    for number, (name, run) in enumerate(cases):
        if number < arguments.skip:
            continue
        if time.time() > arguments.until:
            return 0
        say({"status": "case", "number": number, "case": name})
        for row in rows(run, place.device):
            say({"case": name, **row})
        try:
            _wait(place.device)
        except RuntimeError:
            return LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
