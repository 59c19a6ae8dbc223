"""A file is written where it computes what the model does, and nowhere else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import tiny_host
import upswap
from deployed import IMAGES, Small, far, patched, randomise, sizes
from upswap.errors import ExportError, InputError, OptionError, SaveError, UpswapWarning
from upswap.export.metadata import metadata
from upswap.nn.sampling.samplers import SamplerName


def run(path: Path, x: torch.Tensor, level: Any = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    if level is not None:
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[upswap.Exported, Path]:
    path = tmp_path_factory.mktemp("export") / "model.onnx"
    before = copy.deepcopy(patched().state_dict())
    done = upswap.export_onnx(patched(), path, IMAGES)
    assert all(torch.equal(before[name], value) for name, value in patched().state_dict().items())
    return done, path


def test_it_computes_the_same_at_every_size_and_optimisation(written: Any) -> None:
    done, path = written
    assert (done.path, done.target, done.sampler, done.form, done.opset) == (
        path,
        "onnxruntime",
        "gather",
        "float32",
        18,
    )
    assert done.inputs == {"image": ["batch", 3, "height", "width"]}
    assert done.outputs == ["output"]
    assert done.ran_in == "onnxruntime"
    assert len({row.shapes for row in done.checked}) == 3
    assert done.error is not None
    assert done.error < 1e-5
    level = onnxruntime.GraphOptimizationLevel
    for x in sizes():
        for each in (level.ORT_DISABLE_ALL, level.ORT_ENABLE_BASIC, level.ORT_ENABLE_EXTENDED, level.ORT_ENABLE_ALL):
            assert far(run(path, x, each), patched()(x)) < 1e-5


def test_what_the_file_says_of_itself(written: Any) -> None:
    graph = onnx.load(written[1])
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert said["upswap.version"] == upswap.__version__
    assert (said["upswap.target"], said["upswap.sampler"]) == ("onnxruntime", "gather")
    assert json.loads(said["upswap.inputs"]) == ["image"]
    assert upswap.Plan.from_json(said["upswap.plan"]) == upswap.plan_of(patched())
    names = {node.name for node in graph.graph.node}
    kept = json.loads(said["upswap.float_nodes"])
    assert set(kept) <= names
    places = {name.rpartition("/upswap/")[0] for name in kept}
    assert places == set(upswap.upsamplers(patched()))


def test_a_file_that_is_there_stays(written: Any) -> None:
    with pytest.raises(SaveError, match="force"):
        upswap.export_onnx(patched(), written[1], IMAGES)


@pytest.mark.parametrize("form", [pytest.param("half", marks=pytest.mark.slow), "int8"])
def test_coordinates_stay_float(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    asked: dict[str, Any] = {"half": True} if form == "half" else {"int8": [IMAGES, IMAGES.flip(0)]}
    done = upswap.export_onnx(patched(), path, IMAGES, sampler="gridsample", dynamic=False, **asked)
    assert done.form == form
    assert done.unpatched_error is not None
    graph = onnx.load(path)
    kept = set(json.loads(next(e.value for e in graph.metadata_props if e.key == "upswap.float_nodes")))
    assert kept
    onnx.checker.check_model(graph, full_check=True)
    # Between two nodes of these nothing is rounded: what they read comes from others of them, or is the map.
    made = {name for node in graph.graph.node if node.name in kept for name in node.output}
    maps = {name for node in graph.graph.node if node.op_type in ("Cast", "DequantizeLinear") for name in node.output}
    given = {name for node in graph.graph.node if node.name in kept for name in node.input if name not in made}
    assert len(given & maps) == 1
    floats = {each.name for each in graph.graph.initializer if each.data_type in (1, 7)}
    assert given - maps <= floats
    assert any("Quantize" in node.op_type for node in graph.graph.node) == (form == "int8")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_wide_map_in_half(target: str, tmp_path: Path) -> None:
    """Where a coordinate that is rounded to float16 is off by a quarter of a pixel."""
    x = torch.randn(1, 3, 6, 700, generator=torch.Generator().manual_seed(0))
    small = Small()
    small.up = nn.Upsample(scale_factor=3, mode="bilinear")
    model = upswap.patch(small.eval(), x)
    randomise(model)
    path = tmp_path / f"model{'.xml' if target == 'openvino' else '.onnx'}"
    done = upswap.export_onnx(model, path, x, target=target, half=True, dynamic=False)
    assert done.error is not None
    assert done.unpatched_error is not None
    assert done.error < 5 * done.unpatched_error < 3e-3


@pytest.mark.slow
def test_every_route_and_mode(tmp_path: Path) -> None:
    """Resizes that are layers, in helpers, in loops, on the graph route; align_corners, nearest and bicubic."""
    model = upswap.patch(tiny_host.tiny(), IMAGES, kinds=upswap.KINDS)
    randomise(model)
    for sampler in ("gridsample", "gather"):
        path = tmp_path / f"{sampler}.onnx"
        upswap.export_onnx(model, path, IMAGES, sampler=sampler)
        assert all(far(run(path, x), model(x)) < 2e-5 for x in sizes())


@pytest.mark.slow
@pytest.mark.parametrize("opset", [19, 20, 21, 23])
def test_every_sampler_at_other_opsets(opset: int, tmp_path: Path) -> None:
    model = near()
    for sampler in get_args(SamplerName):
        path = tmp_path / f"{sampler}.onnx"
        asked = [IMAGES] if sampler == "window" else None
        done = upswap.export_onnx(model, path, IMAGES, opset=opset, sampler=sampler, calibration=asked)
        assert done.opset == opset == next(o.version for o in onnx.load(path).opset_import if not o.domain)
        assert done.error is not None
        assert done.error < 1e-5
        assert far(run(path, IMAGES), model(IMAGES)) < 1e-5


# torch announces the end of this exporter, and warns of every size that a trace asks for
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning"
)
@pytest.mark.parametrize("opset", [16, pytest.param(17, marks=pytest.mark.slow)])
def test_every_sampler_by_the_older_exporter(opset: int, tmp_path: Path) -> None:
    """Which alone writes opsets below 18: an exporter of one's own, with `exportable`."""
    model = near()
    for sampler in get_args(SamplerName):
        made = upswap.exportable(model, sampler=sampler, calibration=[IMAGES])
        path = tmp_path / f"{sampler}.onnx"
        axes = {"image": {0: "batch", 2: "height", 3: "width"}}
        names = {"input_names": ["image"], "output_names": ["out"]}
        torch.onnx.export(made, (IMAGES,), path, dynamo=False, opset_version=opset, dynamic_axes=axes, **names)
        for x in sizes() if sampler != "window" else [IMAGES, IMAGES[:1]]:
            assert far(run(path, x), model(x)) < 1e-5


def near() -> nn.Module:
    """Offsets that a window reaches."""
    model = copy.deepcopy(patched())
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.mul_(0.2)
    return model


class Two(Small):
    """It leaves one of its inputs out."""

    def forward(self, image: torch.Tensor, unused: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return super().forward(image) - super().forward(other)


def test_simplified_by_onnxslim(tmp_path: Path) -> None:
    """Which drops inputs that are not used."""
    inputs = (IMAGES, IMAGES + 1, IMAGES.flip(0) * 2)
    model = upswap.patch(Two().eval(), inputs)
    randomise(model)
    done = upswap.export_onnx(model, tmp_path / "model.onnx", inputs, simplify=True, dynamic=False)
    assert done.inputs == {"image": list(IMAGES.shape), "other": list(IMAGES.shape)}
    assert done.error is not None
    assert done.error < 1e-5


SLOW = [pytest.param(form, marks=pytest.mark.slow) for form in ("half", "int8")]


@pytest.mark.parametrize("form", ["float32", *SLOW])
def test_weights_that_are_too_many_for_one_file(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upswap.export import graph as graphs

    monkeypatch.setattr(graphs, "LARGEST", 100)
    asked: dict[str, Any] = {"float32": {}, "half": {"half": True}, "int8": {"int8": [IMAGES]}}[form]
    wide = upswap.patch(Wide().eval(), IMAGES)
    done = upswap.export_onnx(wide, tmp_path / "net.onnx", IMAGES, dynamic=False, **asked)
    assert done.weights == tmp_path / "net.onnx.data"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert (tmp_path / "net.onnx.data").stat().st_size > 64 * 64
    assert done.error is not None
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert far(run(moved / "net.onnx", IMAGES), wide(IMAGES)) < {"float32": 1e-5, "half": 1e-2, "int8": 0.2}[form]


class Wide(Small):
    """Weights that are worth a file."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1)


def test_a_model_in_another_precision(tmp_path: Path) -> None:
    model = copy.deepcopy(patched()).bfloat16()
    with pytest.warns(UpswapWarning, match="Small has parameters of bfloat16: it is exported in float32"):
        done = upswap.export_onnx(model, tmp_path / "net.pt2", IMAGES.bfloat16(), target="torch-export")
    assert done.error is not None
    assert done.error < 1e-5
    program = torch.export.load(done.path)
    assert far(program.module()(IMAGES)[0], model.float()(IMAGES)) < 1e-5


class Scaled(Small):
    """A number for each image."""

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return super().forward(image) * scale.view(-1, 1, 1, 1)


def test_what_belongs_to_an_image_is_open_with_it(tmp_path: Path) -> None:
    inputs = (IMAGES[:1], torch.tensor([2]))
    model = upswap.patch(Scaled().eval(), inputs)
    done = upswap.export_onnx(model, tmp_path / "net.pt2", inputs, target="torch-export")
    assert {row.shapes.rpartition(" ")[2] for row in done.checked} == {"1", "2"}
    assert done.inputs["image"][0] == done.inputs["scale"][0] != 1


def test_inputs_that_the_model_does_not_take(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Small ran on none of the inputs tried(.|\n)*2x2x6x5: .*channels"):
        upswap.export_onnx(patched(), tmp_path / "net.onnx", IMAGES[:, :2])


@pytest.mark.parametrize(
    "target",
    ["openvino", "torch-export", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tensorrt", "rknn"))],
)
def test_other_targets(target: str, tmp_path: Path) -> None:
    suffix = {"openvino": ".xml", "torch-export": ".pt2"}.get(target, ".onnx")
    done = upswap.export_onnx(patched(), tmp_path / f"model{suffix}", IMAGES, target=target)
    assert done.error is not None
    assert done.error < 1e-5
    assert len(done.checked) == 3
    assert done.ran_in == (target if target in ("openvino", "torch-export") else "onnxruntime")
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        {f"model{suffix}", *(["model.bin"] if target == "openvino" else [])}
    )
    found = said(target, done.path)
    assert upswap.Plan.from_json(found["upswap.plan"]) == upswap.plan_of(patched())
    assert {key: found[f"upswap.{key}"] for key in ("target", "sampler", "inputs", "outputs")} == {
        "target": target,
        "sampler": done.sampler,
        "inputs": '["image"]',
        "outputs": '["output"]',
    }


def said(target: str, path: Path) -> dict[str, str]:
    """The metadata of a file, where its format has it."""
    if target == "torch-export":
        found = dict.fromkeys(metadata(patched(), "", "", [], []), "")
        torch.export.load(path, extra_files=found)
        return found
    if target != "openvino":
        return {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    import openvino

    model = openvino.Core().read_model(path)
    found = model.get_rt_info(["framework"]).value
    kept = json.loads(found["upswap.float_nodes"])
    operations = {operation.get_friendly_name() for operation in model.get_ops()}
    assert set(kept) <= operations
    assert kept
    assert {name for name in operations if "/upswap/" in name} == set(kept)
    return found


def test_a_window_reaches_as_far_as_the_calibration_asks(tmp_path: Path) -> None:
    model = near()
    path = tmp_path / "model.onnx"
    with pytest.raises(OptionError, match="needs calibration"):
        upswap.export_onnx(model, path, IMAGES, sampler="window")
    upswap.export_onnx(model, path, IMAGES, sampler="window", calibration=[IMAGES], dynamic=False)
    graph = onnx.load(path)
    assert not {node.op_type for node in graph.graph.node} & {"GridSample", "Gather", "GatherElements", "GatherND"}
    assert far(run(path, IMAGES), model(IMAGES)) < 1e-5
    with pytest.raises(OptionError, match=r"up to \d+\.\d pixels.*gather"):
        upswap.export_onnx(patched(), tmp_path / "far.onnx", IMAGES, sampler="window", calibration=[50 * IMAGES])


class TwoResults(Small):
    """A keyword argument, and tensors in a dict."""

    def forward(self, pixels: torch.Tensor, *, mask: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = super().forward(pixels * mask)
        return {"maps": [x * scale, x.sigmoid()], "loss": None}


def test_names_of_what_goes_in_and_comes_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(2, 1, 8, 8) > 0.5).float()
    inputs = {"pixels": torch.randn(2, 3, 8, 8), "mask": mask, "scale": 2.0}
    model = upswap.patch(TwoResults().eval(), inputs)
    done = upswap.export_onnx(model, tmp_path / "two.onnx", inputs, dynamic=False)
    assert done.inputs == {"pixels": [2, 3, 8, 8], "mask": [2, 1, 8, 8]}
    assert done.outputs == ["maps_0", "maps_1"]


def test_a_model_that_is_not_patched(tmp_path: Path) -> None:
    model = upswap.unpatch(copy.deepcopy(patched()))
    with pytest.warns(UpswapWarning, match="Small is not patched: it is exported as it is"):
        upswap.export_onnx(model, tmp_path / "model.onnx", IMAGES, dynamic=False)
    assert far(run(tmp_path / "model.onnx", IMAGES), model(IMAGES)) < 1e-5


class Trainer(nn.Module):
    """What a LightningModule is: a model inside of another."""

    def __init__(self) -> None:
        super().__init__()
        self.net = copy.deepcopy(patched())

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch)


def test_a_patched_part_of_a_model(tmp_path: Path) -> None:
    done = upswap.export_onnx(Trainer(), tmp_path / "model.onnx", IMAGES, dynamic=False, half=True)
    assert done.unpatched_error is not None
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert upswap.Plan.from_json(said["upswap.plan"]) == upswap.plan_of(patched())
    assert any(name.startswith("net.up/upswap/coords/") for name in json.loads(said["upswap.float_nodes"]))


def test_several_plans() -> None:
    both = nn.ModuleDict({"teacher": copy.deepcopy(patched()), "student": copy.deepcopy(patched())})
    found = json.loads(metadata(both, "", "", [], [])["upswap.plans"])
    plan = upswap.plan_of(patched())
    assert {path: upswap.Plan.from_json(json.dumps(each)) for path, each in found.items()} == {
        "teacher": plan,
        "student": plan,
    }


class Unexportable(Small):
    """Its values choose the way."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = super().forward(pixels)
        return x if float(x.sum()) > 0 else -x


def test_the_message_says_whose_limit_it_is(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = upswap.patch(Unexportable().eval(), x)
    with pytest.raises(ExportError, match=r"Unexportable.*The unpatched model cannot be exported either"):
        upswap.export_onnx(model, tmp_path / "model.onnx", x)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from upswap.export import graph as graphs

    def wrong(graph: onnx.ModelProto) -> onnx.ModelProto:
        """What a simplifier at fault does: another constant."""
        weights = next(each for each in graph.graph.initializer if each.name.endswith("last.weight"))
        weights.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weights), weights.name))
        return graph

    monkeypatch.setattr(graphs, "simplified", wrong)
    with pytest.raises(
        ExportError, match=r"does not compute what the model does.*simplify out.*unpatched model comes out wrong too"
    ):
        upswap.export_onnx(patched(), tmp_path / "model.onnx", IMAGES, simplify=True, dynamic=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("upsampler", ["carafe", "lda_aqu"])
def test_kernel_upsamplers_are_exported_too(upsampler: str, tmp_path: Path) -> None:
    """`export_onnx` compares the file with the model, in onnxruntime."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1)).eval()
    upswap.patch(model, upsampler=upsampler)
    for module in upswap.upsamplers(model).values():
        nn.init.ones_(module.gain)
    upswap.export_onnx(model, tmp_path / "model.onnx")
    assert "Loop" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


class Fused(nn.Module):
    """A map that is upsampled by a guide, and fused with it."""

    def __init__(self, upsampler: str) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.up = upswap.create_upsampler(upsampler, 8, 8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        guide = self.stem(image)
        return self.last(self.up(self.down(guide), guide=guide) + guide)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Fused is not patched")
@pytest.mark.parametrize("upsampler", ["fade", "fade-lite", "sapa-b", "freqfusion"])
def test_guided_upsamplers_are_exported_too(upsampler: str, tmp_path: Path) -> None:
    model = Fused(upsampler).eval()
    original = model(torch.ones(1, 3, 16, 24))
    randomise_all(model.up)
    assert far(model(torch.ones(1, 3, 16, 24)), original) > 0.01
    done = upswap.export_onnx(model, tmp_path / "model.onnx", torch.randn(2, 3, 16, 24))
    assert done.error is not None
    assert len({row.shapes for row in done.checked}) == 3
    # The exporters make a loop of a bag of embeddings, which took forty times as long.
    assert "Loop" not in {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}


def randomise_all(upsampler: nn.Module) -> None:
    """Weights that tell, and gains of 1, by which the published operator is all there is."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in upsampler.named_parameters():
            parameter.copy_(torch.ones(()) if "gain" in name else torch.randn(parameter.shape, generator=generator) / 2)
