"""What is asked of an export, and what of it a target cannot have."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from pathlib import Path
from typing import Any, Literal

from ..errors import OptionError, UpswapWarning
from ..nn.sampling.samplers import SamplerName
from .targets import OPSET, Target, check_installed, sampler_for

Form = Literal["float32", "half", "int8"]


def form_of(*, half: bool, int8: Any) -> Form:
    """The precision asked for; `OptionError` for both."""
    if half and int8 is not None:
        raise OptionError("half and int8 exclude each other")
    return "half" if half else "float32" if int8 is None else "int8"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The target and what is asked of it, under the names of `export_onnx`."""

    target: Target
    opset: int
    dynamic: bool | None
    sampler_name: str
    form: Form
    int8: Any = None
    window_data: Any = None
    simplify: bool = False
    check: bool = True

    @property
    def sampler(self) -> SamplerName:
        """What upsamplers read with."""
        return sampler_for(self.target, self.sampler_name)

    @property
    def open_sizes(self) -> bool:
        """Whether batch and image size are to stay open."""
        return self.target.dynamic if self.dynamic is None else self.dynamic

    @property
    def by_onnx(self) -> bool:
        """Whether an ONNX graph is made on the way."""
        return self.target.writes_onnx or self.target.name == "openvino"

    def refuse_misfits(self, path: Path) -> None:
        """`OptionError` for what the target does not take."""
        target = self.target
        check_installed(target)
        _ = self.sampler
        if not path.name.endswith(target.suffix):
            raise OptionError(f"{path}: a file of {target.name} ends in {target.suffix}")
        if self.open_sizes and not target.dynamic:
            raise OptionError(f"{target.name} takes fixed sizes: leave dynamic out")
        if self.form not in target.formats:
            raise OptionError(f"no {self.form} for {target.name} from here; it takes {', '.join(target.formats)}")
        if self.by_onnx:
            self._refuse_opset()
        elif self.opset != OPSET:
            raise OptionError(f"opset is of ONNX graphs, and {target.name} takes none: leave it out")
        if self.window_data is not None and self.sampler != "window":
            raise OptionError(f"calibration is for the sampler 'window', and this is {self.sampler!r}: leave it out")
        if self.simplify and not self.by_onnx:
            raise OptionError(f"simplify works on ONNX graphs, and {target.name} takes none")
        if self.simplify and importlib.util.find_spec("onnxslim") is None:
            raise OptionError("simplify needs onnxslim: pip install onnxslim")

    def _refuse_opset(self) -> None:
        name, newest = self.target.name, self.target.newest_opset
        if self.opset < OPSET:
            raise OptionError(
                f"opset {self.opset} is too low: the exporter writes {OPSET} and later. torch's older one writes 16 and 17: "
                "torch.onnx.export(upswap.exportable(model), ..., dynamo=False, opset_version=16)"
            )
        if self.opset <= newest:
            return
        if name == "tensorrt":
            # NVIDIA/TensorRT issue 4646, onnx-tensorrt issue 1060.
            message = f"TensorRT reads mode='linear' of opset {newest + 1} and later as nearest; {OPSET} is the default"
            warnings.warn(UpswapWarning(message), stacklevel=4)
        else:
            raise OptionError(f"opset {self.opset}: {name} reads {newest} at most; {OPSET} is the default")
