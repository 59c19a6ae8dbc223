"""A header of bytes cannot make gigabytes."""

from __future__ import annotations

import contextlib
import json
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import upswap
from fuzz.guard import Peak
from models import assert_same, patched, unet
from upswap import PlanError, SourceError
from upswap.files import open_source
from upswap.files.formats import safetensors as portable
from upswap.files.formats.host_architecture import _entries
from upswap.files.safety import memory_limit
from upswap.files.safety.memory_limit import Budget


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return upswap.save(patched(unet()), tmp_path_factory.mktemp("budget") / "model.safetensors")


def _refused(path: Path, says: str) -> None:
    memory, start = Peak(), time.process_time()
    with pytest.raises((SourceError, PlanError), match=says):
        upswap.load(path)
    # What a small model may take is the floor of the bound, 256 MiB.
    assert memory.megabytes() < 600
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("smp:unet?encoder_name=resnet18&classes=100000000", "number 100000000"),
        ("timm:vit_tiny_patch16_224?depth=1000000000", "number 1000000000"),
        ("timm:vit_tiny_patch16_224?depth=4096", "far larger"),
        ("timm:vit_tiny_patch16_224?embed_dim=4095", "far larger"),
        ("smp:unet?encoder_name=resnet152&decoder_channels=(4096,4096,4096,4096,4096)", "far larger"),
        # Of small tables a large one is made, by no function that is told a size.
        ("timm:swin_tiny_patch4_window7_224?window_size=300&img_size=4096", "far larger"),
        ("timm:resnet18?drop_path_rate=1e300", "number 1e"),
    ],
)
def test_an_architecture_far_larger_than_the_weights(spec: str, says: str, tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(64)}
    header = {"schema": 1, "source": spec, "plan": None, "shared": {}}
    path = tmp_path / "model.safetensors"
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    _refused(path, says)


def _edited(file: Path, path: Path, **entries: Any) -> Path:
    tensors, header = portable.read(file)
    for site in header["plan"]["sites"]:
        site.update(entries)
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    return path


def test_upsamplers_far_larger_than_the_weights(file: Path, tmp_path: Path) -> None:
    _refused(_edited(file, tmp_path / "one.safetensors", channels=10**9), "number 1000000000")
    many = list(range(8, 20_008, 8))
    _refused(_edited(file, tmp_path / "many.safetensors", other_channels=many), r"far larger|with the number 4104")


def test_shared_tensors_count_once(tmp_path: Path) -> None:
    tensors = {"weight": torch.zeros(2**20)}
    header = {"schema": 1, "source": "timm:vit_tiny_patch16_224?embed_dim=3072", "plan": None}
    header["shared"] = {f"w{index}": "weight" for index in range(10_000)}
    path = tmp_path / "model.safetensors"
    portable.write(tensors, {portable.HEADER_KEY: json.dumps(header)}, path)
    _refused(path, "far larger")


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0"])
@pytest.mark.parametrize("name", list(smp.MODEL_ARCHITECTURES_MAPPING))
def test_every_architecture_of_smp_is_within_it(name: str, encoder: str, tmp_path: Path) -> None:
    if (name, encoder) in (("unetplusplus", "mit_b0"), ("linknet", "mit_b0"), ("dpt", "mit_b0")):
        pytest.skip("SMP has no such model")
    encoder = "tu-vit_tiny_patch16_224" if name == "dpt" else encoder
    _comes_back(f"smp:{name}?encoder_name={encoder}", tmp_path)


@pytest.mark.parametrize(
    "spec",
    [
        "timm:hrnet_w18_small",
        "timm:swinv2_tiny_window8_256",
        "torchvision:swin_t",
        "torchvision:deeplabv3_mobilenet_v3_large",
    ],
)
def test_models_of_timm_and_torchvision_are_within_it(spec: str, tmp_path: Path) -> None:
    _comes_back(spec, tmp_path)


def _comes_back(spec: str, tmp_path: Path) -> None:
    model = open_source.open_source(spec).model.eval()
    path = upswap.save(model, tmp_path / "model.safetensors", source=spec)
    got = upswap.load(path)
    for (name, tensor), (same, other) in zip(model.state_dict().items(), got.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(tensor, other)


def test_a_patched_model_in_half_precision_is_within_it(tmp_path: Path) -> None:
    model = patched(smp.UPerNet("resnet18", encoder_weights=None).eval())  # graph and source route
    assert_same(upswap.load(upswap.save(model, tmp_path / "model.safetensors")), model)
    half = upswap.load(upswap.save(model.half(), tmp_path / "half.safetensors"))
    assert next(half.parameters()).dtype is torch.float16


def test_every_way_to_make_memory_counts() -> None:
    held = {"a": torch.zeros(1)}
    big = 2**27  # 512 MiB of float32, above the floor
    vector = torch.zeros(2**15)
    ways: dict[str, Any] = {
        "zeros": lambda: torch.zeros(big),
        "randn": lambda: torch.randn(2, big),
        "arange": lambda: torch.arange(big),
        "linspace": lambda: torch.linspace(0, 1, big),
        "outer": lambda: vector[:, None] - vector,
        "clone": lambda: torch.zeros(1).expand(big).clone(),
        "contiguous": lambda: torch.zeros(1).expand(big).contiguous(),
        "to": lambda: torch.zeros(1).expand(big).to(torch.float64),
        "repeat": lambda: vector.repeat(2**13),
        "cat": lambda: torch.cat([vector] * 2**13),
        "stack": lambda: torch.stack([vector] * 2**13),
        "in steps": lambda: [torch.zeros(2**20) for _ in range(200)],
        "in small ones": lambda: [torch.zeros(1) for _ in range(10_000)],
        "from a thread's worth of layers": lambda: torch.nn.Linear(2**14, 2**14),
    }
    for name, way in ways.items():
        memory = Peak()
        says = r"f\.safetensors describes a model far larger"
        with pytest.raises(SourceError, match=says), Budget(held, "f.safetensors").building():
            way()
        assert memory.megabytes() < 400, name


def test_an_error_put_in_the_place_of_ours_is_ours_again() -> None:
    def wrapped() -> None:
        try:
            torch.zeros(2**40)
        except Exception as error:
            raise RuntimeError("cannot build") from error

    def swallowed() -> None:
        with contextlib.suppress(SourceError):
            torch.zeros(2**40)

    for way in (wrapped, swallowed):
        with pytest.raises(SourceError, match="far larger"), Budget({}, "f").building():
            way()
    with pytest.raises(RuntimeError, match="another"), Budget({}, "f").building():
        raise RuntimeError("another")


def test_what_takes_no_memory_is_not_counted() -> None:
    with Budget({}, "f").building():
        with FakeTensorMode() as mode:
            fake = torch.zeros(2**40)
            (fake + 1).view(2, -1).clone()
            mode.from_tensor(torch.zeros(1)).expand(2**40).clone()
        torch.zeros(2**40, device="meta").clone()
        torch.zeros(1).expand(2**40).view(2, -1)
        torch.zeros(2**10).add_(1)
        torch.nonzero(torch.ones(2**10))


def test_numbers_have_to_be_those_of_the_tensors() -> None:
    tensors = {"a": torch.zeros(10_000, 2), "empty": torch.zeros(10**9, 0)}
    Budget(tensors, "f").check_numbers({"classes": 10_000, "sizes": (512, [4096, -1, None, "text", True])})
    for number in (10_001, -(10**6), 1e9, float("nan"), float("inf"), 10**400):
        with pytest.raises(SourceError, match="f describes a model with the number"):
            Budget(tensors, "f").check_numbers({"deep": [({"x": number},)]})


def test_an_expanded_or_meta_tensor_explains_nothing() -> None:
    for tensor in (torch.zeros(1).expand(2**40), torch.zeros(2**40, device="meta")):
        budget = Budget({"a": tensor}, "f")
        with pytest.raises(SourceError, match="far larger"), budget.building():
            torch.zeros(2**28)
        with pytest.raises(SourceError, match="largest tensor has a side of 0"):
            budget.check_numbers([2**30])
    one = torch.zeros(2**20)
    with pytest.raises(SourceError, match=r"4\.0 MiB"), Budget({str(n): one[n:] for n in range(100)}, "f").building():
        torch.zeros(2**28)


def test_what_takes_time_and_no_memory_is_counted_too() -> None:
    def modules() -> None:
        nn.Sequential(*(nn.Identity() for _ in range(100_000)))

    def on_the_meta_device() -> None:
        tensor = torch.zeros(1, device="meta")
        for _ in range(1_000_000):
            tensor = tensor + 1

    for way, says in ((modules, "modules"), (on_the_meta_device, "operations")):
        start = time.process_time()
        with pytest.raises(SourceError, match=f"far larger.*{says}"), Budget({}, "f").building():
            way()
        assert time.process_time() - start < 20
    nn.Sequential(*(nn.Identity() for _ in range(10_000)))  # not any more


@pytest.mark.parametrize(
    "settings",
    [
        {"depths": [99_999, 1, 1, 1]},
        {"num_labels": 10**6, "id2label": None, "label2id": None},
        {"num_labels": 10**6 - 1},
        {"hidden_sizes": [10**9, 1, 1, 1]},
    ],
)
def test_a_configuration_of_transformers_is_bounded_on_the_meta_device(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    config = {"architectures": ["SegformerForSemanticSegmentation"], "model_type": "segformer", **settings}
    (tmp_path / "config.json").write_text(json.dumps(config))
    portable.write({"weight": torch.zeros(64)}, {"format": "pt"}, tmp_path / "model.safetensors")
    import transformers.models.segformer.modeling_segformer  # noqa: F401 - its import is not what is measured

    memory, start = Peak(), time.process_time()
    with pytest.raises(SourceError, match=r"far larger|with the number"):
        open_source.open_source(f"hf:{tmp_path}")
    assert memory.megabytes() < 600
    assert time.process_time() - start < 20


@pytest.mark.parametrize("depth", [100, 400])
def test_json_nested_with_many_entries_below_takes_time_by_its_length(depth: int) -> None:
    """Entries were handed up through every level."""
    entries = 40_000
    value: Any = {str(index): index for index in range(entries)}
    for _ in range(depth):
        value = {"a": value}
    start = time.process_time()
    assert len(list(_entries(value))) == entries + depth
    assert time.process_time() - start < 1


OWN = """
    import torch
    from torch import nn

    class Attention(nn.Module):
        # of all pixels to all pixels, in four heads: 85 MB for 48x48, some times over
        def __init__(self):
            super().__init__()
            self.head, self.up, self.tail = nn.Conv2d(3, 8, 1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 3)

        def forward(self, x):
            x = self.head(x)
            flat = x.flatten(2).unflatten(1, (4, 2))
            x = x + (flat @ torch.softmax(flat.transpose(2, 3) @ flat, 3)).flatten(1, 2).view_as(x)
            return self.tail(self.up(x))
"""


@pytest.mark.parametrize("floor", [2**30, 2**20], ids=["run", "run without memory"])
@pytest.mark.parametrize("given", [False, True], ids=["built", "given"])
def test_a_model_whose_activations_are_larger_than_its_file(
    floor: int, given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_attention.py").write_text(textwrap.dedent(OWN))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(memory_limit, "_RUN_BYTES_FLOOR", floor)
    spec = "python:own_attention:Attention"
    model = upswap.patch(open_source.open_source(spec).model.eval(), torch.zeros(1, 3, 48, 48))
    path = upswap.save(model, tmp_path / "model.safetensors", source=spec)
    new = open_source.open_source(spec).model.eval() if given else None
    got = upswap.load(path, new) if given else upswap.load(path, trust="own_attention")
    x = torch.rand(1, 3, 16, 16)
    assert torch.equal(got(x), model(x))
    changed = _edited(path, tmp_path / "changed.safetensors", scale=[3.0, 3.0])  # the run still shows what differs
    with pytest.raises(PlanError, match=r"does not fit"):
        upswap.load(changed, trust="own_attention")
