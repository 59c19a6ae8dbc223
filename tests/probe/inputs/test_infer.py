from __future__ import annotations

import collections
import dataclasses
import json
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import invariants
from upswap import InputError
from upswap.probe.inputs.describe import build, describe
from upswap.probe.inputs.infer import candidates, example_inputs_for
from upswap.probe.inputs.inputs import Inputs, as_inputs, map_tensors
from upswap.probe.inputs.variations import enlarged, training_inputs
from upswap.probe.observe import first_that_runs, observe

X = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, 2), (X, 2), {}),
        ([X, 2], (X, 2), {}),
        ({"x": X}, (), {"x": X}),
        (((X,), {"flag": True}), (X,), {"flag": True}),
        (([X], {}), (X,), {}),
        (([X, X],), ([X, X],), {}),
        (({"image": X},), ({"image": X},), {}),
    ],
)
def test_the_forms_of_example_inputs(given: object, args: object, kwargs: object) -> None:
    inputs = as_inputs(given)
    assert str(inputs.args) == str(args)
    assert str(inputs.kwargs) == str(kwargs)


@pytest.mark.parametrize("given", [3, "image", None, X.numpy()])
def test_what_is_no_input_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="pass a tensor"):
        as_inputs(given)


def test_inferred_inputs_follow_the_first_convolution() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 2, 1).double(), nn.Conv2d(2, 9, 1))
    (image,) = example_inputs_for(model, (32, 48)).args
    assert image.shape == (1, 5, 32, 48)
    assert image.dtype == torch.float64
    assert example_inputs_for(model).args[0].shape == (1, 5, 64, 64)


class Made(nn.Module):
    """Its first convolution is handed what it makes of the image: gradients, or the mean of the colours."""

    def __init__(self, channels: int, image: int) -> None:
        super().__init__()
        self.conv, self.channels, self.image = nn.Conv2d(channels, 4, 3, padding=1), channels, image

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.image == 3:
            red, green, blue = x.unbind(1)
            return self.conv((red + green + blue).unsqueeze(1))
        return self.conv(torch.cat([x.roll(shift, -1) - x for shift in range(self.channels)], dim=1))


@pytest.mark.parametrize(("channels", "image"), [(10, 1), (1, 3)])
def test_a_convolution_may_be_handed_what_the_model_makes_of_the_image(channels: int, image: int) -> None:
    (x,) = first_that_runs(Made(channels, image), candidates(Made(channels, image))).inputs.tensors()
    assert x.shape[1] == image


def test_inferring_takes_no_random_numbers() -> None:
    model = nn.Conv2d(1, 1, 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = example_inputs_for(model).args[0]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, example_inputs_for(model).args[0])


def test_nothing_to_infer_from_says_what_to_pass() -> None:
    with pytest.raises(InputError, match="pass example_inputs"):
        example_inputs_for(nn.Linear(3, 3))
    with pytest.raises(InputError, match="positive"):
        example_inputs_for(nn.Conv2d(3, 3, 1), (0, 5))


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


@dataclasses.dataclass(frozen=True)
class Record:
    maps: dict[str, torch.Tensor]
    pair: Pair
    note: str | None = None

    def __post_init__(self) -> None:
        raise AssertionError("no code of a class is run")


def rebuilt(value: object) -> Any:
    """`value` described, written as JSON, read and built again with tensors of ones."""
    return build(json.loads(json.dumps(describe(value))), lambda shape, dtype: torch.ones(shape, dtype=dtype))


def test_descriptions_are_plain_data_and_build_the_same_again() -> None:
    again = rebuilt(
        Inputs(
            (torch.zeros(2, 3, dtype=torch.int64), [1, (2.5, None)], torch.Size([4, 5])),
            {"mode": "x", "on": torch.half},
        )
    )
    assert isinstance(again, Inputs)
    assert again.args[0].shape == (2, 3)
    assert again.args[0].dtype == torch.int64
    assert again.args[1:] == ([1, (2.5, None)], torch.Size([4, 5]))
    assert type(again.args[2]) is torch.Size
    assert again.kwargs == {"mode": "x", "on": torch.half}


def test_descriptions_of_containers_with_names() -> None:
    blank = object.__new__(Record)
    for name, value in {"maps": {"a": X}, "pair": Pair(X, 3), "note": None}.items():
        object.__setattr__(blank, name, value)
    for value in (blank, map_tensors(blank, lambda tensor: tensor + 1)):
        again = rebuilt([value, {1: X}, collections.OrderedDict(z=X, a=[X, X])])
        assert type(again[0]) is Record
        assert type(again[0].pair) is Pair
        assert again[0].maps["a"].shape == again[0].pair.first.shape == X.shape
        assert again[0].pair.second == 3
        assert again[0].note is None
        assert again[1][1].shape == X.shape
        assert type(again[2]) is collections.OrderedDict
        assert list(again[2]) == ["z", "a"]


def test_descriptions_of_what_transformers_models_give() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    value = outputs.BaseModelOutput(last_hidden_state=X, hidden_states=(X, X))
    for again in (rebuilt(value), map_tensors(value, torch.ones_like)):
        assert type(again) is outputs.BaseModelOutput
        assert again[0] is again["last_hidden_state"] is again.last_hidden_state
        assert list(again) == ["last_hidden_state", "hidden_states"]
        assert again.attentions is None
        assert again.to_tuple()[1][1].shape == X.shape


@pytest.mark.parametrize("name", ["Gone", "X", "nn.Conv2d", "json.JSONDecoder"])
def test_a_description_builds_nothing_but_dataclasses(name: str) -> None:
    with pytest.raises(InputError, match="no loaded dataclass"):
        build({"instance": [__name__, name, {}]}, lambda shape, dtype: torch.ones(shape))
    with pytest.raises(InputError, match="no loaded dataclass"):
        build({"instance": ["not_imported_by_anyone", name, {}]}, lambda shape, dtype: torch.ones(shape))


def local_class() -> object:
    @dataclasses.dataclass
    class Local:
        x: int = 0

    return Local()


@pytest.mark.parametrize("value", [object(), {(1, 2): 2}, {"a": {3}}, nn.ReLU(), local_class()])
def test_what_cannot_be_described_is_refused(value: object) -> None:
    with pytest.raises(InputError):
        describe(value)


def test_enlarged_changes_images_only() -> None:
    bigger = enlarged(
        Inputs((torch.zeros(2, 3, 64, 33), torch.zeros(7), torch.zeros(1, 1, 8, 8, dtype=torch.int64)), {})
    )
    assert [tuple(t.shape) for t in bigger.tensors()] == [(2, 3, 96, 66), (7,), (1, 1, 8, 8)]
    wider = enlarged(Inputs((torch.zeros(2, 3, 64, 96),), {}), height=False)
    assert [tuple(t.shape) for t in wider.tensors()] == [(2, 3, 64, 128)]


def test_enlarged_knows_lists_pairs_and_masks() -> None:
    lists = enlarged(Inputs(([torch.zeros(3, 64, 64), torch.zeros(3, 1333, 32)],), {}))
    assert [tuple(t.shape) for t in lists.tensors()] == [(3, 96, 96), (3, 1333, 64), (3, 1333, 64)]
    mask = torch.ones(1, 64, 64, dtype=torch.int64)
    pair = enlarged(
        Inputs((), {"pixel_values": torch.zeros(1, 2, 1, 64, 64), "mask": mask, "ids": mask[0]}), height=False
    )
    assert [tuple(t.shape) for t in pair.tensors()] == [(1, 2, 1, 64, 96), (1, 64, 96), (64, 64)]
    assert pair.kwargs["mask"].all()


def test_map_tensors_keeps_structure() -> None:
    pair = collections.namedtuple("pair", "a b")
    value = {"p": pair(X, 1), "l": [X, (X,)], "s": torch.Size([1, 2])}
    mapped = map_tensors(value, lambda t: t + 1)
    assert type(mapped["p"]) is pair
    assert mapped["p"].a.sum() == X.numel()
    assert mapped["s"] == torch.Size([1, 2])
    assert type(mapped["s"]) is torch.Size


# What is inferred, on the models of the libraries -----------------------------------------------------------------------------


def inferred(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The first inferred inputs the model runs on, as the shapes of its arguments."""
    inputs = first_that_runs(model.eval(), candidates(model)).inputs
    named = {**dict(enumerate(inputs.args)), **inputs.kwargs}
    return {
        str(name): tuple(value.shape) if isinstance(value, torch.Tensor) else [tuple(item.shape) for item in value]
        for name, value in named.items()
    }


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with invariants.quiet():
        yield


def of_zoo(zoo: str, name: str) -> nn.Module:
    """The model of a case of a zoo."""
    pytest.importorskip(invariants.ZOOS[zoo])
    return next(case for case in invariants.cases_of(zoo) if case.name == name).build()


def test_torchvision_detection_takes_a_narrow_image_that_it_does_not_resize() -> None:
    detection = pytest.importorskip("torchvision.models.detection")
    weights = {"weights": None, "weights_backbone": None}
    model = detection.fasterrcnn_mobilenet_v3_large_320_fpn(max_size=320, **weights)
    first = first_that_runs(model, candidates(model))
    assert [tuple(t.shape) for t in first.inputs.tensors()] == [(3, 320, 32)]
    maps = [call.in_shape for call in first.calls if call.owner == "backbone.fpn"]
    second = observe(model, enlarged(first.inputs))
    wider = [call.in_shape for call in second.calls if call.owner == "backbone.fpn"]
    assert [shape[-2:] for shape in maps] == [(10, 1)]
    assert [shape[-2:] for shape in wider] == [(10, 2)]
    assert inferred(detection.ssdlite320_mobilenet_v3_large(**weights)) == {"0": [(3, 320, 32)]}
    assert [tuple(t.shape) for t in example_inputs_for(model, (50, 70)).tensors()] == [(3, 50, 70)]


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("fasterrcnn_resnet18_fpn", {"boxes", "labels"}),
        ("maskrcnn_resnet18_fpn", {"boxes", "labels", "masks"}),
        ("keypointrcnn_resnet18_fpn", {"boxes", "labels", "keypoints"}),
        ("retinanet_resnet18_fpn", {"boxes", "labels"}),
        ("fcos_resnet18_fpn", {"boxes", "labels"}),
        ("ssd300_vgg", {"boxes", "labels"}),
    ],
)
def test_torchvision_detection_is_trained_with_targets(name: str, targets: set[str]) -> None:
    model = of_zoo("torchvision", name)
    inputs = first_that_runs(model, candidates(model)).inputs
    training = training_inputs(model, inputs)
    assert len(training.kwargs["images"]) == 2
    assert all(set(target) == targets for target in training.kwargs["targets"])
    assert len(inputs.args[0]) == 1
    losses = model.train()(*training.args, **training.kwargs)
    assert len(losses) >= 2
    assert all(loss.isfinite() for loss in losses.values())
    assert training_inputs(model, training) is training


def test_optical_flow_takes_two_images() -> None:
    flow = pytest.importorskip("torchvision.models.optical_flow")
    assert inferred(flow.raft_small()) == {"0": (1, 3, 128, 128), "1": (1, 3, 128, 128)}


@pytest.mark.parametrize(
    ("name", "options", "shape"),
    [
        ("vit_tiny_patch16_224", {}, (1, 3, 224, 224)),
        ("vit_tiny_patch16_224", {"img_size": (48, 80), "in_chans": 5}, (1, 5, 48, 80)),
        ("vit_tiny_patch16_224", {"dynamic_img_size": True}, (1, 3, 64, 64)),
        ("naflexvit_base_patch16_gap", {"embed_dim": 24, "num_heads": 2, "depth": 1}, (1, 3, 64, 64)),
        ("hrnet_w18_small", {"in_chans": 1, "features_only": True}, (1, 1, 64, 64)),
        ("csatv2", {}, (1, 3, 64, 64)),
    ],
)
def test_timm(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    timm = pytest.importorskip("timm")
    assert inferred(timm.create_model(name, **options)) == {"0": shape}


def test_smp_and_ultralytics_with_other_channels() -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    assert inferred(smp.Unet("resnet18", encoder_weights=None, in_channels=7)) == {"0": (1, 7, 64, 64)}
    tasks = pytest.importorskip("ultralytics.nn.tasks")
    assert inferred(tasks.DetectionModel("yolov8n.yaml", ch=1, verbose=False)) == {"0": (1, 1, 64, 64)}


def test_monai() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    small = {"in_channels": 1, "out_channels": 2, "channels": (4, 8), "num_res_blocks": 1, "norm_num_groups": 4}
    diffusion = nets.DiffusionModelUNet(spatial_dims=2, attention_levels=(False, False), num_head_channels=4, **small)
    assert inferred(diffusion) == {"0": (1, 1, 64, 64), "1": (1,)}
    assert inferred(nets.BasicUNet(3, 4, 2, features=(4, 4, 4, 4, 4, 4))) == {"0": (1, 4, 32, 32, 32)}
    assert inferred(nets.UNETR(1, 2, 32, spatial_dims=2, feature_size=4, hidden_size=24, mlp_dim=24, num_heads=2)) == {
        "0": (1, 1, 32, 32)
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sam", {"pixel_values": (1, 3, 64, 64)}),
        ("vitpose", {"pixel_values": (1, 3, 64, 48)}),
        ("clipseg", {"pixel_values": (1, 3, 64, 64), "input_ids": (1, 8), "attention_mask": (1, 8)}),
        ("oneformer-swin", {"pixel_values": (1, 3, 64, 64), "task_inputs": (1, 8)}),
        ("efficientloftr", {"pixel_values": (1, 2, 1, 64, 64)}),
        (
            "seggpt",
            {"pixel_values": (1, 3, 32, 32), "prompt_pixel_values": (1, 3, 32, 32), "prompt_masks": (1, 3, 32, 32)},
        ),
        ("grounding-dino", {"pixel_values": (1, 3, 128, 128), "input_ids": (1, 6), "attention_mask": (1, 6)}),
        ("prompt-depth-anything", {"pixel_values": (1, 3, 64, 64)}),
    ],
)
def test_transformers(name: str, expected: dict[str, tuple[int, ...]]) -> None:
    assert inferred(of_zoo("transformers", name)) == expected


class Steps(nn.Module):
    """Takes arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(torch.bfloat16)

    def forward(self, x: Any, timestep: Any, image2: Any, scale: float = 1.0, *, image3: Any) -> Any:
        return self.conv(x + image2 + image3) * timestep.view(-1, 1, 1, 1) * scale


class Odd(Steps):
    def forward(self, x: Any, prompt: Any, *, mask: Any) -> Any:
        return x


class Closed(nn.Module):
    def forward(self, latent: Any, flag: bool = True) -> Any:
        return latent


def test_required_arguments_of_plain_names_are_made() -> None:
    inputs = next(candidates(Steps())).inputs
    assert [tuple(t.shape) for t in inputs.tensors()] == [(1, 2, 64, 64), (1,), (1, 2, 64, 64), (1, 2, 64, 64)]
    assert inputs.args[0].dtype == inputs.kwargs["image3"].dtype == torch.bfloat16
    assert inputs.args[1].dtype == torch.int64
    assert not torch.equal(inputs.args[0], inputs.args[2])
    doubled = training_inputs(Steps(), inputs)
    assert [len(t) for t in doubled.tensors()] == [2] * 4


def test_arguments_nobody_can_make_up_are_named() -> None:
    with pytest.raises(InputError, match=r"needs x, prompt, mask, .* cannot make up prompt, mask; .*'prompt': \.\.\."):
        next(candidates(Odd()))
    with pytest.raises(InputError, match=r"takes \(latent, flag=True\): pass example_inputs"):
        next(candidates(Closed()))


def test_a_batch_of_two_is_fit_for_training_as_it_is() -> None:
    inputs = Inputs((torch.zeros(2, 3, 8, 8), torch.zeros(1)), {})
    assert training_inputs(nn.Conv2d(3, 3, 1), inputs) is inputs
