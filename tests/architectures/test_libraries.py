"""Paths and specs that lead to models, and the messages where they do not."""

import sys

import pytest
import torch
from segmentation_models_pytorch import FPN, Unet
from torch import nn

from upswap import SourceError, UntrustedFileError
from upswap.architectures.libraries import build
from upswap.architectures.rebuild import rebuild, rebuilds
from upswap.architectures.spec import Spec, parse
from upswap.files.open_source import open_source
from upswap.files.provenance import spec_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("smp:unet", Spec("smp", "unet", {})),
        ("smp:Unet?classes=3&encoder_name=resnet18", Spec("smp", "Unet", {"classes": 3, "encoder_name": "resnet18"})),
        ("smp:unet?decoder_channels=(64,32,16,8,4)", Spec("smp", "unet", {"decoder_channels": (64, 32, 16, 8, 4)})),
        (
            "smp:unet?encoder_weights=None&a='3'&b=1e-3&c=True",
            Spec("smp", "unet", {"encoder_weights": None, "a": "3", "b": 1e-3, "c": True}),
        ),
        ("smp:unet?activation=a%26b", Spec("smp", "unet", {"activation": "a&b"})),
        ("timm:hf-hub:timm/hrnet", Spec("timm", "hf-hub:timm/hrnet", {})),
    ],
)
def test_parse(text: str, expected: Spec) -> None:
    assert parse(text) == expected
    assert parse(str(expected)) == expected


@pytest.mark.parametrize("text", ["unet.pt", "a/b.pt", "C:\\models\\unet.pt", "unet"])
def test_a_path_is_no_spec(text: str) -> None:
    assert parse(text) is None


def test_a_file_with_a_colon_in_its_name_is_a_file(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smp:unet").write_bytes(b"")
    assert parse("smp:unet") is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("foo:bar", "none of smp:, timm:, torchvision:"),
        ("smp:", "names no architecture"),
        ("smp:unet?classes", "key=value"),
        ("smp:unet?classes=1&classes=2", "twice"),
        ("hf:some/dir", "no folder some/dir"),
        ("hf:.", "no config.json"),
        ("python:pkg", "package.module:factory"),
        ("python:pkg:make", "needs the package pkg"),
        ("python:torch.nn:make", "no name 'make'"),
        ("python:torch.nn:Linear.weigh", "no name 'weigh'"),
        ("python:torch.nn:Linear", "missing 2 required"),
        ("python:torch:float32", "neither a factory nor"),
        ("python:math:sqrt?x=2", "cannot be built"),
        ("smp:unit", "near it: unet"),
        ("smp:unet?encoder_name=resnet19", "near it: resnet18"),
        ("smp:unet?clases=3", "near it: classes"),
        ("smp:unet?encoder_name=tu-convnext_atto&clases=3", "clases"),
        ("smp:dpt", "tu-"),
        ("timm:hrnet_w19", "near it: hrnet_w18"),
        ("torchvision:fasterrcnn_resnet50", "fasterrcnn_resnet50_fpn"),
        ("torchvision:fcn_resnet50?nosuch=1", "nosuch"),
        ("missing.pt", "no file"),
    ],
)
def test_what_leads_nowhere_says_why(text: str, says: str) -> None:
    with pytest.raises(SourceError, match="(?s)" + says.replace("?", r"\?")) as caught:
        open_source(text)
    assert "\n" not in str(caught.value)


def test_smp_models_are_built_without_weights_and_with_their_options() -> None:
    source = open_source("smp:FPN?encoder_name=resnet18&classes=5&in_channels=4")
    assert isinstance(source.model, FPN)
    assert source.model.encoder.conv1.in_channels == 4
    assert source.model.segmentation_head[0].out_channels == 5
    assert source.path is None


def test_torchvision_detection_fetches_no_backbone(monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    source = open_source("torchvision:fasterrcnn_mobilenet_v3_large_320_fpn")
    assert type(source.model).__name__ == "FasterRCNN"


def test_timm_options_reach_timm() -> None:
    model = build(Spec("timm", "resnet10t", {"features_only": True, "out_indices": (1, 2)}))
    assert [tuple(f.shape[1:2]) for f in model(torch.zeros(1, 3, 32, 32))] == [(64,), (128,)]


@pytest.mark.parametrize("scheme", ["smp", "timm", "torchvision"])
def test_a_missing_package_names_what_to_install(scheme: str, monkeypatch) -> None:
    package = {"smp": "segmentation_models_pytorch"}.get(scheme, scheme)
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)

    class Absent:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name.partition(".")[0] == package:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(sys, "meta_path", [Absent(), *sys.meta_path])
    with pytest.raises(SourceError, match=rf"pip install 'upswap\[{scheme}\]'"):
        build(Spec(scheme, "unet", {}))


def test_an_smp_model_from_a_file_knows_its_spec(tmp_path) -> None:
    model = Unet("resnet18", encoder_weights=None, classes=2)
    torch.save(model, tmp_path / "unet.pt")
    source = open_source(str(tmp_path / "unet.pt"))
    assert type(source.model) is Unet
    assert source.path == tmp_path / "unet.pt"
    spec = spec_of(source.model)
    assert spec is not None
    again = build(parse(spec))
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]


def test_weights_go_into_a_spec(tmp_path) -> None:
    model = Unet("resnet18", encoder_weights=None, classes=2)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = open_source("smp:unet?encoder_name=resnet18&classes=2", weights=tmp_path / "weights.pt").model
    assert all(
        torch.equal(old, new)
        for old, new in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    with pytest.raises(SourceError, match=r"segmentation_head\.0\.weight is"):
        open_source("smp:unet?encoder_name=resnet18&classes=3", weights=tmp_path / "weights.pt")
    with pytest.raises(SourceError, match="missing: "):
        open_source("smp:unet?encoder_name=resnet34&classes=2", weights=tmp_path / "weights.pt")


def test_no_spec_for_a_model_that_does_not_know_how_it_was_made() -> None:
    assert spec_of(nn.Conv2d(1, 1, 1)) is None
    # A callable has no place in a spec.
    assert spec_of(Unet("resnet18", encoder_weights=None, activation=nn.Sigmoid)) is None
    changed = Unet("resnet18", encoder_weights=None)
    changed.segmentation_head = nn.Conv2d(16, 1, 1)
    assert spec_of(changed) is None
    changed = Unet("resnet18", encoder_weights=None)
    changed.encoder.conv1.stride = (1, 1)
    assert spec_of(changed) is None


@pytest.mark.parametrize(
    "text",
    [
        "timm:hf-hub:evil/model",
        "smp:unet?encoder_name=tu-hf-hub:evil/model",
        "smp:unet?encoder_weights=imagenet",
        "timm:resnet10t?pretrained=True",
        "timm:resnet10t?checkpoint_path=/etc/passwd",
        "torchvision:fcn_resnet50?weights_backbone=DEFAULT",
    ],
)
def test_a_header_may_not_name_what_is_fetched(text: str) -> None:
    with pytest.raises(UntrustedFileError, match="fetched from elsewhere"):
        rebuild(text, "file.safetensors")


PACKAGE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x):
        return self.head(nn.functional.interpolate(self.stem(x), scale_factor=2))

made = Net(3)
answer = 42
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package of the user's own in the current folder, which is not on Python's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    (tmp_path / "nets_here").mkdir()
    (tmp_path / "nets_here" / "unets.py").write_text(PACKAGE)
    (tmp_path / "nets_here" / "broken.py").write_text("import no_such_package_at_all")
    (tmp_path / "nets_here" / "raises.py").write_text("raise OSError('no licence')")
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "nets_here"]:
        del sys.modules[name]  # not by monkeypatch, which would put it back


def test_a_factory_of_ones_own(own) -> None:
    source = open_source("python:nets_here.unets:Net?width=8")
    assert type(source.model).__name__ == "Net"
    assert source.model.stem.out_channels == 8
    assert (source.spec, source.path) == ("python:nets_here.unets:Net?width=8", None)
    assert open_source("python:nets_here.unets:made").model.stem.out_channels == 3
    for text, says in {
        "python:nets_here.unets:Nat": "near it: Net",
        "python:nets_here.nowhere:Net": "no module nets_here.nowhere",
        "python:nets_here.unets:answer": "neither a factory nor",
        "python:nets_here.unets:Net?depth=8": "depth",
        "python:nets_here.broken:Net": "importing nets_here.broken fails: No module named 'no_such_package_at_all'",
        "python:nets_here.raises:Net": "OSError: no licence",
    }.items():
        with pytest.raises(SourceError, match=says):
            open_source(text)


def test_a_header_runs_a_factory_only_of_a_trusted_package(own) -> None:
    text = "python:nets_here.unets:Net?width=8"
    for trust in ((), ["nets"], ["nets_here_too"]):
        assert not rebuilds(text, trust)
        with pytest.raises(UntrustedFileError, match="--trust nets_here"):
            rebuild(text, "file.safetensors", trust)
    assert "nets_here.unets" not in sys.modules
    assert rebuilds(text, ["nets_here"])
    assert rebuild(text, "file.safetensors", ["nets_here"]).stem.out_channels == 8


def test_a_folder_of_somebodys_disk_is_not_built_from_a_header() -> None:
    assert not rebuilds("hf:/home/somebody/model")
    with pytest.raises(SourceError, match="pass model="):
        rebuild("hf:/home/somebody/model", "file.safetensors")
