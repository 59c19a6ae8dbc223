"""What each runtime takes, and what was measured best for it."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any, get_args

from ..errors import OptionError
from ..nn.sampling.samplers import SamplerName

SAMPLERS: tuple[str, ...] = get_args(SamplerName)

#: Channels of a group from which onnxruntime 1.32 reads a point's row faster than its elements: in 0.6 to 0.8 of the time with 16
#: to 64 of them, in 1.9 with 4.
WHOLE_ROWS = 12

#: The opset of ONNX files where none is asked for: TensorRT reads mode="linear" of 20 and later as nearest.
OPSET = 18


@dataclasses.dataclass(frozen=True)
class Target:
    """A runtime and what is written for it."""

    name: str
    suffix: str
    """Of its file."""
    sampler: SamplerName
    """What "auto" takes."""
    samplers: tuple[SamplerName, ...] = ("gridsample", "gather", "window")
    """What it can run."""
    rows: bool | None = None
    """Whether "gather" reads all channels of a point at once; None where there have to be `WHOLE_ROWS` in a group."""
    packages: tuple[str, ...] = ()
    """What has to be importable, to convert and to run."""
    install: str = ""
    """The names of these packages for pip."""
    dynamic: bool = True
    """Whether its files can leave sizes open."""
    newest_opset: int = 26
    formats: tuple[str, ...] = ("float32",)
    """"half" and "int8" where it takes those from here."""
    batches: bool = True
    """Whether it knows a batch; else it gets one image."""
    runs_here: bool = True
    """Whether the runtime itself runs where the file is made; else the graph alone is checked."""

    @property
    def writes_onnx(self) -> bool:
        """Whether its file is an ONNX graph."""
        return self.suffix == ".onnx"


_ONNX = ("onnx", "onnxscript", "onnxruntime")
_PIP_ONNX = "onnx onnxscript onnxruntime"

TARGETS = {
    target.name: target
    for target in (
        # GatherElements and Gather take 0.3 to 0.7 of GridSample's time in its CPU provider.
        Target(
            "onnxruntime",
            ".onnx",
            "gather",
            packages=_ONNX,
            install=_PIP_ONNX,
            formats=("float32", "half", "int8"),
        ),
        Target(
            "openvino",
            ".xml",
            "gridsample",
            packages=(*_ONNX, "openvino"),
            install=f"{_PIP_ONNX} openvino",
            formats=("float32", "half"),
        ),
        Target(
            "tensorrt",
            ".onnx",
            "gridsample",
            packages=_ONNX,
            install=_PIP_ONNX,
            newest_opset=19,
            formats=("float32", "half", "int8"),
            runs_here=False,
        ),
        # RKNN-Toolkit 2.3 has no GridSample, takes ONNX up to opset 19 and fixed sizes.
        Target(
            "rknn",
            ".onnx",
            "gather",
            ("gather", "window"),
            rows=True,
            packages=_ONNX,
            install=_PIP_ONNX,
            dynamic=False,
            newest_opset=19,
            runs_here=False,
        ),
        Target(
            "coreml",
            ".mlpackage",
            "gridsample",
            packages=("coremltools",),
            install="coremltools",
            dynamic=False,
            formats=("float32", "half"),
            runs_here=False,  # on macOS alone
        ),
        Target(
            "litert",
            ".tflite",
            "gather",
            ("gather", "window"),
            rows=True,
            packages=("litert_torch", "ai_edge_litert"),
            install="litert-torch",
            dynamic=False,
        ),
        Target(
            "executorch",
            ".pte",
            "gridsample",
            rows=True,
            packages=("executorch",),
            install="executorch",
            dynamic=False,
        ),
        Target(
            "ncnn",
            ".ncnn.param",
            "gridsample",
            ("gridsample",),
            packages=("pnnx", "ncnn"),
            install="pnnx ncnn",
            dynamic=False,
            batches=False,
        ),
        Target("torch-export", ".pt2", "gridsample", rows=True),
    )
}


def target_named(name: str) -> Target:
    """The target of a name; `OptionError` where there is none."""
    target = TARGETS.get(name)
    if target is None:
        raise OptionError(f"there is no target {name!r}; there are {', '.join(TARGETS)}")
    return target


def check_installed(target: Target) -> None:
    """`OptionError` where a package that writes or runs its files is missing."""
    missing = [name for name in target.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise OptionError(f"target {target.name!r} needs {', '.join(missing)}: pip install {target.install}")


def sampler_for(target: Target, name: str) -> SamplerName:
    """The sampler of a name, or what "auto" means for a target; `OptionError` where the target does not run it."""
    chosen: Any = target.sampler if name == "auto" else name
    if chosen not in SAMPLERS:
        raise OptionError(f"there is no sampler {name!r}; there are auto, {', '.join(SAMPLERS)}")
    if chosen not in target.samplers:
        raise OptionError(f"{target.name} has no {chosen}; it takes {', '.join(target.samplers)}")
    return chosen
