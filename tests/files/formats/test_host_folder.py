"""Model folders: those the hosts write, opened by `hf:`, and those `upswap.save` writes, opened by both sides."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import upswap
from fuzz.guard import Peak
from invariants import Given, assert_close, outputs
from models import patched
from upswap import OptionError, SaveError, SourceError, UntrustedFileError, UpswapError, UpswapWarning
from upswap.apps.cli import run
from upswap.files.formats import host_architecture
from upswap.files.open_source import open_source
from zoos.transformers_zoo import CASES

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
FILES = {"config.json", "model.safetensors", "upswap.json", "upswap.safetensors"}

SMP: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: smp.Unet(
        "resnet18", encoder_weights=None, classes=3, activation="sigmoid", aux_params={"classes": 4, "dropout": 0.2}
    ),
    "unet-timm": lambda: smp.Unet(
        "tu-resnet10t", encoder_weights=None, in_channels=1, decoder_interpolation="bilinear"
    ),
    "fpn": lambda: smp.FPN("mit_b0", encoder_weights=None, decoder_merge_policy="cat"),
    "upernet": lambda: smp.UPerNet("resnet18", encoder_weights=None, decoder_channels=32),
    "segformer": lambda: smp.Segformer("mit_b0", encoder_weights=None, decoder_segmentation_channels=32),
    "deeplabv3plus": lambda: smp.DeepLabV3Plus("resnet18", encoder_weights=None, decoder_channels=32),
}
TRANSFORMERS = (
    "segformer", "upernet-convnext", "upernet-swin", "dpt", "glpn", "depth-anything", "maskformer-swin", "mask2former-swin",
    "rt-detr-v2",  # shared weights: each decoder layer's heads are there twice
)  # fmt: skip


def smp_model(name: str = "unet") -> nn.Module:
    torch.manual_seed(0)
    return SMP[name]().eval()


def segformer(**settings: Any) -> nn.Module:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        mlp_ratios=[2, 2, 2, 2],
        decoder_hidden_size=16,
        num_labels=5,
        **settings,
    )
    torch.manual_seed(0)
    return transformers.SegformerForSemanticSegmentation(config).eval()


def of_the_zoo(name: str) -> tuple[nn.Module, Given]:
    case = next(case for case in CASES if case.name == name)
    model = case.build()
    return model, case.inputs(model, 0)


def assert_same(got: nn.Module, expected: nn.Module, given: Given = IMAGES) -> None:
    """The same weights, bit for bit, in the same order and of the same types, and the same outputs.

    Weights that are read out of a file may begin at any address, and torch's kernels round by that.
    """
    old, new = expected.state_dict(), got.state_dict()
    assert list(new) == list(old)
    assert all(new[name].dtype == old[name].dtype and torch.equal(new[name], old[name]) for name in old)
    with torch.no_grad():
        assert_close(outputs(got.eval(), given), outputs(expected.eval(), given), tolerance=1e-6)


def from_host(folder: Path, like: nn.Module) -> nn.Module:
    """What the host's own, strict `from_pretrained` makes of a folder, which has all its weights and no others."""
    if not isinstance(like, transformers.PreTrainedModel):
        return smp.from_pretrained(str(folder))
    model, info = type(like).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def edit(path: Path, **changes: Any) -> None:
    """Other entries in a JSON file; None takes one out."""
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Nobody is asked for anything: each connection that is tried fails, and fails the test."""
    tried: list[Any] = []

    def refuse(*args: Any, **_: Any) -> None:
        tried.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield tried
    assert tried == []


@pytest.fixture(scope="session")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that transformers wrote and one that upswap wrote, of the same model."""
    home = tmp_path_factory.mktemp("templates")
    segformer().save_pretrained(home / "host")
    upswap.save(patched(segformer()), home / "ours")
    return home


@pytest.fixture
def host(templates: Path, tmp_path: Path) -> Path:
    return shutil.copytree(templates / "host", tmp_path / "host")


@pytest.fixture
def ours(templates: Path, tmp_path: Path) -> Path:
    return shutil.copytree(templates / "ours", tmp_path / "ours")


# What is written is what is read, on both sides ------------------------------------------------------------------------------


def check_round_trip(original: nn.Module, given: Given, where: Path) -> None:
    """Through a folder of the host's, and through one of upswap's, opened by upswap, by the host, and by both in turn."""
    original.save_pretrained(where / "host")
    assert_same(open_source(f"hf:{where / 'host'}").model, original, given)

    changed = patched(copy.deepcopy(original))
    with torch.no_grad():
        differences = [
            not torch.equal(new, old)
            for new, old in zip(outputs(changed, given), outputs(original, given), strict=True)
        ]
    assert any(differences), "the upsamplers do not show in the output"
    assert upswap.save(changed, where / "folder") == where / "folder"
    assert set(contents(where / "folder")) == FILES

    assert_same(upswap.load(where / "folder"), changed, given)
    host = from_host(where / "folder", original)
    assert_same(host, original, given)
    assert upswap.load(where / "folder", host) is host
    assert_same(host, changed, given)


@pytest.mark.parametrize("name", SMP)
def test_models_of_smp(name: str, tmp_path: Path) -> None:
    model = smp_model(name)
    check_round_trip(model, IMAGES[:, :1] if name == "unet-timm" else IMAGES, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("upernet-swin", "rt-detr-v2") else ())
        for name in TRANSFORMERS
    ],
)
def test_models_of_transformers(name: str, tmp_path: Path) -> None:
    check_round_trip(*of_the_zoo(name), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    check_round_trip(segformer().to(dtype), IMAGES.to(dtype), tmp_path)
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_weights_that_are_shared_are_written_once_and_shared_again(tmp_path: Path) -> None:
    model, _ = of_the_zoo("rt-detr-v2")
    upswap.save(patched(model), tmp_path / "folder")
    shared = json.loads((tmp_path / "folder" / "upswap.json").read_text())["shared"]
    names = set(load_file(tmp_path / "folder" / "model.safetensors"))
    assert shared
    assert names.isdisjoint(shared)
    again = upswap.load(tmp_path / "folder").state_dict(keep_vars=True)
    assert all(again[alias] is again[name] for alias, name in shared.items() if isinstance(again[name], nn.Parameter))


@pytest.mark.parametrize("make", [segformer, smp_model])
def test_the_same_bytes_for_the_same_model(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    for name in ("one", "two"):
        upswap.save(patched(make()), tmp_path / name)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    again = upswap.load(tmp_path / "two")
    upswap.save(again, tmp_path / "two", force=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_what_an_smp_config_says_is_what_smp_says(tmp_path: Path) -> None:
    model = smp_model("unet")
    model.save_pretrained(tmp_path / "host")
    upswap.save(patched(model), tmp_path / "folder")
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("host", "folder"))
    assert ours == theirs


def test_a_model_that_is_not_patched(tmp_path: Path) -> None:
    model = segformer()
    upswap.save(model, tmp_path / "folder")
    assert set(contents(tmp_path / "folder")) == FILES - {"upswap.safetensors"}
    loaded = upswap.load(tmp_path / "folder")
    assert_same(loaded, model)
    assert_same(from_host(tmp_path / "folder", model), model)
    with pytest.raises(upswap.PlanError):
        upswap.plan_of(loaded)


def test_training_mode_comes_back(tmp_path: Path) -> None:
    upswap.save(patched(segformer()).train(), tmp_path / "folder")
    assert upswap.load(tmp_path / "folder").training


def test_a_model_without_a_host_brings_its_spec_or_is_passed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
    fresh, shape = copy.deepcopy(model), copy.deepcopy(model)
    upswap.patch(model, kinds=("feature", "logits"))
    upswap.save(model, tmp_path / "named", source="torchvision:lraspp_mobilenet_v3_large")
    upswap.save(model, tmp_path / "unnamed")
    assert set(contents(tmp_path / "named")) == set(contents(tmp_path / "unnamed")) == FILES - {"config.json"}
    assert_same(upswap.load(tmp_path / "named"), model)
    with pytest.raises(SourceError, match=r"does not say how its model is built; pass it: upswap\.load\("):
        upswap.load(tmp_path / "unnamed")
    assert_same(upswap.load(tmp_path / "unnamed", shape), model)
    assert_same(
        open_source("torchvision:lraspp_mobilenet_v3_large", weights=tmp_path / "named/model.safetensors").model, fresh
    )


class OwnSegformer(transformers.SegformerForSemanticSegmentation):
    """A class that transformers does not have."""


class Renamed(transformers.SegformerForSemanticSegmentation):
    """A class of the user's own that goes by the name of one of transformers'."""


Renamed.__name__ = Renamed.__qualname__ = "SegformerForSemanticSegmentation"


@pytest.mark.parametrize("cls", [OwnSegformer, Renamed])
def test_a_class_of_the_users_own_is_passed(cls: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = cls(segformer().config).eval()
    fresh = copy.deepcopy(model)
    upswap.save(patched(model), tmp_path / "folder")
    with pytest.raises(SourceError, match=r"pass it: upswap.load"):
        upswap.load(tmp_path / "folder")
    assert not upswap.files.checkpoint.says_how_it_is_built(tmp_path / "folder")
    assert_same(cls.from_pretrained(tmp_path / "folder"), fresh)
    assert_same(upswap.load(tmp_path / "folder", cls.from_pretrained(tmp_path / "folder")), model)


def test_a_model_that_was_changed_after_it_was_made_is_passed(tmp_path: Path) -> None:
    model = segformer()
    model.decode_head.activation = nn.Hardtanh()  # its configuration says nothing of that
    fresh = copy.deepcopy(model)
    upswap.save(patched(model), tmp_path / "folder")
    with pytest.raises(SourceError, match=r"pass it: upswap.load"):
        upswap.load(tmp_path / "folder")
    assert_same(upswap.load(tmp_path / "folder", fresh), model)


def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path) -> None:
    upswap.save(patched(segformer()), tmp_path / "folder")
    other = transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(**{**segformer().config.to_dict(), "num_labels": 7})
    ).eval()
    before = copy.deepcopy(other)
    with pytest.raises(SourceError, match=r"decode_head\.classifier\.weight is \(5,"):
        upswap.load(tmp_path / "folder", other)
    assert_same(other, before)
    assert type(other) is type(before)
    for wrong in (smp_model(), patched(segformer())):
        with pytest.raises(UpswapError, match=r"this plan was made for|patched already"):
            upswap.load(tmp_path / "folder", wrong)


# Over what is there ----------------------------------------------------------------------------------------------------------


def test_saving_over_a_folder_needs_force_and_leaves_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    upswap.save(patched(segformer()), folder)
    (folder / "README.md").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref")
    before = contents(folder)
    model = patched(smp_model())
    with pytest.raises(SaveError, match="exists already; --force"):
        upswap.save(model, folder)
    assert contents(folder) == before
    upswap.save(model, folder, force=True)
    assert_same(upswap.load(folder), model)
    assert set(contents(folder)) == FILES | {"README.md"}
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / ".git" / "HEAD").read_text() == "ref"


def test_no_upsamplers_stay_where_the_new_model_has_none(tmp_path: Path) -> None:
    upswap.save(patched(segformer()), tmp_path / "folder")
    upswap.save(segformer(), tmp_path / "folder", force=True)
    assert load_file(tmp_path / "folder" / "upswap.safetensors") == {}
    assert_same(upswap.load(tmp_path / "folder"), segformer())


@pytest.mark.parametrize("pickled", [False, True])
def test_another_model_is_not_written_over(pickled: bool, tmp_path: Path) -> None:
    model = segformer()
    model.save_pretrained(tmp_path)
    if pickled:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    before = contents(tmp_path)
    for force in (False, True):
        with pytest.raises(SaveError, match="holds another model"):
            upswap.save(model, tmp_path, force=force)
        with pytest.raises(SaveError, match=r"is the source itself|holds another model"):
            upswap.save(model, tmp_path, source=f"hf:{tmp_path}", force=force)
    assert contents(tmp_path) == before


def test_a_model_of_no_host_is_not_written_beside_the_config_of_one(tmp_path: Path) -> None:
    upswap.save(patched(segformer()), tmp_path / "folder")
    before = contents(tmp_path / "folder")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3))
    with pytest.raises(SaveError, match=r"config.json that is not of this model"):
        upswap.save(upswap.patch(model, IMAGES), tmp_path / "folder", force=True)
    assert contents(tmp_path / "folder") == before


def test_a_config_that_is_another_after_it_was_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "folder"
    segformer().save_pretrained(folder)
    check = host_architecture._check_config

    def checked(*args: Any) -> None:
        check(*args)
        edit(folder / "config.json", semantic_loss_ignore_index=7)

    monkeypatch.setattr(host_architecture, "_check_config", checked)
    with pytest.raises(SourceError, match=r"config\.json was written to while it was read; load it again"):
        open_source(f"hf:{folder}")


def test_a_folder_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    changed = patched(segformer())
    for name in ("folder/", "./other", ".", "../here/", str(tmp_path / "far")):
        upswap.save(changed, name, force=True)
        assert_same(upswap.load(name), changed)
        assert_same(open_source(f"hf:{name}").model, changed)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = segformer()
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="is a file; name a folder"):
        upswap.save(model, tmp_path / "file")
    with pytest.raises(SaveError, match="no folder"):
        upswap.save(model, tmp_path / "missing" / "folder")
    monkeypatch.setattr(os, "access", lambda *_: False)  # these tests may run as root, who may write anywhere
    with pytest.raises(SaveError, match="read-only"):
        upswap.save(model, tmp_path / "folder")


# Hosts' folders in other forms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [segformer, smp_model])
def test_weights_in_a_bin(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = make()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert_same(open_source(f"hf:{tmp_path}").model, model)

    ran = tmp_path / "ran"
    torch.save({"weight": Evil(f"open({str(ran)!r}, 'w')")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UntrustedFileError, match=r"builtins.eval"):
        open_source(f"hf:{tmp_path}")
    assert not ran.exists()
    torch.save([1], tmp_path / "pytorch_model.bin")
    with pytest.raises(SourceError, match="no state dict, but a list"):
        open_source(f"hf:{tmp_path}")


class Evil:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (self.code,)


@pytest.mark.parametrize("pickled", [False, True])
def test_weights_in_several_files(pickled: bool, tmp_path: Path) -> None:
    model = segformer()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    index = tmp_path / "model.safetensors.index.json"
    if pickled:
        for shard in tmp_path.glob("*.safetensors"):
            torch.save(load_file(shard), shard.with_suffix(".bin"))
            shard.unlink()
        index.write_text(index.read_text().replace(".safetensors", ".bin"))
        index = index.rename(tmp_path / "pytorch_model.bin.index.json")
    assert len({path.stem for path in tmp_path.glob("model-*")}) > 2
    assert_same(open_source(f"hf:{tmp_path}").model, model)

    next(iter(tmp_path.glob("model-00002*"))).unlink()
    with pytest.raises(SourceError, match="not whole: there is no model-00002"):
        open_source(f"hf:{tmp_path}")
    edit(index, weight_map={"weight": "../../elsewhere.safetensors"})
    with pytest.raises(UntrustedFileError, match="outside its folder"):
        open_source(f"hf:{tmp_path}")
    edit(index, weight_map=[1])
    with pytest.raises(SourceError, match="no weight_map"):
        open_source(f"hf:{tmp_path}")


def test_weights_that_are_missing_or_left_over_are_named(tmp_path: Path) -> None:
    model = segformer()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    taken = weights.pop("decode_head.classifier.bias")
    weights["decode_head.upsample.offset.bias"] = taken
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UpswapWarning) as told:
        open_source(f"hf:{tmp_path}")
    said = " | ".join(str(warning.message) for warning in told)
    assert "does not hold decode_head.classifier.bias" in said
    assert "left out: decode_head.upsample.offset.bias" in said
    save_file({"a": taken}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="none is of that model"):
        open_source(f"hf:{tmp_path}")


def test_weights_of_another_shape(tmp_path: Path) -> None:
    for name, model in (("a", segformer()), ("b", smp_model())):
        model.save_pretrained(tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        key = next(key for key in weights if key.endswith(("classifier.weight", "segmentation_head.0.weight")))
        weights[key] = weights[key][:, :2].contiguous()
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(SourceError) as caught:
            open_source(f"hf:{tmp_path / name}")
        assert "\n" not in str(caught.value)


# What is refused -------------------------------------------------------------------------------------------------------------


EVIL = "open({!r}, 'w').close()\n\nclass Config: ...\nclass Model: ...\n"

#: Changes to `config.json` that would have code run or something fetched.
ELSEWHERE = {
    "auto_map": {"auto_map": {"AutoConfig": "modeling_evil.Config", "AutoModel": "modeling_evil.Model"}},
    "auto_map inside": {"backbone_config": {"auto_map": {"AutoModel": "some/one--modeling_evil.Model"}}},
    "attention": {"attn_implementation": "some-one/kernel"},
    "attention, as saved": {"_attn_implementation": "some-one/kernel:entry"},
    "attention of parts": {"attn_implementation": {"": "sdpa", "backbone_config": "some-one/kernel"}},
    "attention inside": {"backbone_config": {"model_type": "swin", "_attn_implementation": "some-one/kernel"}},
    "experts": {"experts_implementation": "some-one/kernel@v1"},
    "pretrained backbone": {"use_pretrained_backbone": True},
    "backbone": {"backbone": "some/one"},
    "backbone of timm": {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:some/one"}},
    "backbone in a folder": {"backbone_config": {"model_type": "timm_backbone", "backbone": "local-dir:there"}},
    "another config": {"configuration_files": ["config.1.0.0.json"]},
    "timm": {"architectures": ["TimmWrapperModel"], "model_args": {"checkpoint_path": "evil.pth"}},
    "timm name": {"architectures": ["TimmWrapperModel"], "architecture": "local-dir:there"},
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
@pytest.mark.parametrize("whose", ["host", "ours"])
def test_a_configuration_brings_no_code_and_fetches_nothing(
    name: str, whose: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, ran = request.getfixturevalue(whose), tmp_path / "ran"
    (folder / "modeling_evil.py").write_text(EVIL.format(str(ran)))
    shutil.copy(folder / "config.json", folder / "config.1.0.0.json")
    edit(folder / "config.json", **ELSEWHERE[name])
    with pytest.raises(UntrustedFileError, match="from elsewhere") as caught:
        upswap.load(folder) if whose == "ours" else open_source(f"hf:{folder}")
    assert "\n" not in str(caught.value)
    assert not ran.exists()
    assert "modeling_evil" not in sys.modules


@pytest.mark.parametrize(
    "cls", ["MaskFormerForInstanceSegmentation", "DPTForDepthEstimation", "UperNetForSemanticSegmentation"]
)
def test_a_backbone_by_name_is_not_asked_for(cls: str, host: Path) -> None:
    # transformers asks the hub whether there is a repository of that name, slash or not.
    config = {"architectures": [cls], "backbone": "someone", "use_timm_backbone": False}
    (host / "config.json").write_text(json.dumps(config))
    with pytest.raises(UntrustedFileError, match="from elsewhere"):
        open_source(f"hf:{host}")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"encoder_name": "tu-hf-hub:some/one"}, "from elsewhere"),
        ({"encoder_name": "some/one"}, "from elsewhere"),
        ({"encoder_name": "tu-resnet10t", "pretrained_cfg": {"hf_hub_id": "some/one"}}, "from elsewhere"),
        ({"encoder_name": "tu-resnet10t", "checkpoint_path": "evil.pth"}, "from elsewhere"),
        ({"encoder_name": "tu-resnet10t", "pretrained": True}, "from elsewhere"),
        ({"encoder_name": "resnet19"}, "near it: resnet18"),
        ({"decoder_chanels": [1]}, "near it: decoder_channels"),
        ({"encoder_weights": "imagenet"}, None),  # not wanted: the folder has weights
        ({"classes": 10**9}, "10{9}|1e\\+09"),
        ({"_model_class": "Unot"}, "near it: unet"),
        ({"_model_class": ["Unet"]}, "no architecture"),
        ({"_model_class": None}, "names no architecture of transformers or SMP"),
    ],
)
def test_the_options_of_an_smp_model_are_looked_at(changes: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    model = smp_model()
    model.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", **changes)
    if says is None:
        assert_same(open_source(f"hf:{tmp_path}").model, model)
        return
    with pytest.raises(SourceError, match=says) as caught:
        open_source(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["NoSuchModel"]}, "which transformers .*, installed here, does not have"),
        ({"architectures": ["models"]}, "does not have"),
        ({"architectures": ["PreTrainedModel"]}, "cannot be read"),
        ({"architectures": []}, "names no architecture"),
        ({"architectures": [1]}, "names no architecture"),
        (
            {"architectures": None, "architecture": "hrnet_w18"},
            "timm: name its architecture, timm:hrnet_w18 --weights ",
        ),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised"),
        ({"num_labels": 10**400, "id2label": None, "label2id": None}, "the number 1000"),
        ({"depths": "many"}, "cannot be read|cannot be built"),
        ({"num_encoder_blocks": 9}, "cannot be read|cannot be built"),
    ],
)
def test_a_configuration_that_makes_no_model(changes: dict[str, Any], says: str, host: Path) -> None:
    edit(host / "config.json", **changes)
    with pytest.raises(SourceError, match=says) as caught:
        open_source(f"hf:{host}")
    assert "\n" not in str(caught.value)


def changed_plan(folder: Path, **changes: Callable[[Any], Any]) -> Path:
    """A folder of transformers of a patched model, in the plan of which a stranger changed entries of the swapped sites."""
    patched(segformer()).save_pretrained(folder)
    plan = json.loads(json.loads((folder / "config.json").read_text())["upswap_plan"])
    for site in plan["sites"]:
        if site["swap"]:
            site.update({key: change(site[key]) for key, change in changes.items()})
    edit(folder / "config.json", upswap_plan=json.dumps(plan))
    return folder


NAME = {"module": lambda name: f"{name}';import os#"}
CHANNELS = {"other_channels": lambda _: [2**24]}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "says", "given"),
    [
        (NAME, "is refused", False),
        (NAME, "is refused", True),
        (CHANNELS, "describes a model", False),
        (CHANNELS, "describes a model", True),
    ],
)
def test_a_refused_plan_is_told(
    changes: dict[str, Callable[[Any], Any]], says: str, given: bool, tmp_path: Path
) -> None:
    """The error that refuses it is the cause and the consequence of others, which were gone through without end."""
    folder, like = changed_plan(tmp_path / "folder", **changes), segformer() if given else None
    names, level = set(segformer().state_dict()), transformers.utils.logging.get_verbosity()
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    memory = Peak()
    with pytest.raises(SourceError, match=says):
        upswap.load(folder, like)
    assert memory.megabytes() < 400
    assert transformers.utils.logging.get_verbosity() == level
    assert offline == huggingface_hub.constants.HF_HUB_OFFLINE
    assert like is None or (not upswap.is_patched(like) and set(like.state_dict()) == names)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("form", ["hosts", "ours"])
def test_an_error_that_nobody_foresaw_leaves_the_model_that_is_passed_as_it_was(
    form: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "folder"
    if form == "hosts":
        patched(segformer()).save_pretrained(folder)
    else:
        upswap.save(patched(segformer()), folder)

    def fail(*_: Any, **__: Any) -> None:
        raise error("unforeseen")

    monkeypatch.setattr(f"upswap.files.formats.{'folder' if form == 'hosts' else 'description'}.assign", fail)
    model = segformer()
    with pytest.raises((error, SourceError), match="unforeseen"):
        upswap.load(folder, model)
    assert not upswap.is_patched(model)
    assert_same(model, segformer())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


BROKEN: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no description": ("upswap.json", Path.unlink, "has no upswap.json.*hf:"),
    "no upsamplers": ("upswap.safetensors", Path.unlink, "not whole: there is no upswap.safetensors"),
    "no weights": ("model.safetensors", Path.unlink, "not whole: there is no model.safetensors"),
    "no config": ("config.json", Path.unlink, "pass it: upswap.load"),
    "weights cut": ("model.safetensors", cut, "model.safetensors is not a whole"),
    "upsamplers cut": ("upswap.safetensors", cut, "upswap.safetensors is not a whole"),
    "weights empty": ("model.safetensors", lambda path: path.write_bytes(b""), "model.safetensors"),
    "lfs": ("model.safetensors", lfs, "Git LFS pointer.*git lfs pull"),
    "lfs upsamplers": ("upswap.safetensors", lfs, "Git LFS pointer.*git lfs pull"),
    "description cut": ("upswap.json", cut, "upswap.json cannot be read"),
    "description empty": ("upswap.json", lambda path: path.write_text("{}"), "describes no model"),
    "description a list": ("upswap.json", lambda path: path.write_text("[1]"), "upswap.json"),
    "description not text": ("upswap.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "upswap.json cannot be read"),
    "description deep": ("upswap.json", lambda path: path.write_text("[" * 10**5), "upswap.json cannot be read"),
    "description newer": ("upswap.json", lambda path: edit(path, schema=99, upswap_version="9.9"), "written by upswap 9.9"),
    "no plan": ("upswap.json", lambda path: edit(path, plan={"sites": 1}), "plan"),
    "config a list": ("config.json", lambda path: path.write_text("[]"), "config.json is not what it is named for"),
    "config not JSON": ("config.json", cut, "config.json cannot be read"),
    "config deep": ("config.json", lambda path: path.write_text('{"a":' * 900 + "1" + "}" * 900), "config.json"),
    "config of another": (
        "config.json", lambda path: edit(path, decoder_hidden_size=8), r"does not hold the weights|does not fit|channels",
    ),
    "config huge": ("config.json", lambda path: edit(path, decoder_hidden_size=90_000), "far larger than the weights"),
    "upsamplers as weights": (
        "model.safetensors", lambda path: shutil.copy(path.with_name("upswap.safetensors"), path), "missing: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_whole_says_why(name: str, ours: Path) -> None:
    file, damage, says = BROKEN[name]
    damage(ours / file)
    with pytest.raises(UpswapError, match=says) as caught:
        upswap.load(ours)
    assert "\n" not in str(caught.value) or isinstance(caught.value, upswap.PlanError)  # each site in a line of its own


@pytest.mark.parametrize(
    "spec", ["torchvision:fcn_resnet50?weights=DEFAULT", "timm:hf-hub:some/one", "python:os:getcwd", 7]
)
def test_a_source_of_a_strangers_is_not_built(spec: Any, ours: Path) -> None:
    edit(ours / "upswap.json", source=spec)
    edit(ours / "upswap.json", config_builds=False)
    with pytest.raises(SourceError, match=r"pass it|pass the model"):
        upswap.load(ours)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"without upswap.json"):
        upswap.load(tmp_path)
    with pytest.raises(SourceError, match=r"there is no folder.*hf download"):
        open_source(f"hf:{tmp_path / 'no'}")
    with pytest.raises(SourceError, match=r"no config\.json"):
        open_source(f"hf:{tmp_path}")
    segformer().config.save_pretrained(tmp_path)
    edit(tmp_path / "config.json", architectures=["SegformerForSemanticSegmentation"])
    with pytest.raises(SourceError, match=r"no weights: there is no model\.safetensors"):
        open_source(f"hf:{tmp_path}")
    lfs(tmp_path / "model.safetensors")
    with pytest.raises(SourceError, match="Git LFS pointer"):
        open_source(f"hf:{tmp_path}")


def test_a_model_for_a_file_that_needs_none(tmp_path: Path) -> None:
    upswap.save(patched(segformer()), tmp_path / "whole.pt")
    with pytest.raises(OptionError, match="whole model"):
        upswap.load(tmp_path / "whole.pt", segformer())


# The command line ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [segformer, smp_model])
def test_from_a_hosts_folder_to_ours_and_back(
    make: Callable[[], nn.Module], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make()
    model.save_pretrained(tmp_path / "host")
    capfd.readouterr()
    assert run(["convert", f"hf:{tmp_path / 'host'}", "--json"]) == 0
    said = capfd.readouterr()
    result = json.loads(said.out)
    assert said.err.strip() == ""  # no progress bars, no logs
    assert result["saved"] == str(tmp_path / "host-upswap")
    assert result["load"] == f'model = upswap.load("{tmp_path / "host-upswap"}")'
    loaded = upswap.load(result["saved"])
    assert set(upswap.upsamplers(loaded))
    assert_same(upswap.unpatch(loaded), model)

    assert run(["revert", result["saved"], "-o", str(tmp_path / "reverted")]) == 0
    assert_same(from_host(tmp_path / "reverted", model), model)


def test_progress_bars_and_logs_are_as_they_were_afterwards(tmp_path: Path) -> None:
    logging = transformers.utils.logging
    segformer().save_pretrained(tmp_path)
    for shown, level in ((True, logging.INFO), (False, logging.ERROR)):
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        logging.set_verbosity(level)
        open_source(f"hf:{tmp_path}")
        edit(tmp_path / "config.json", depths="many")
        with contextlib.suppress(SourceError):
            open_source(f"hf:{tmp_path}")
        edit(tmp_path / "config.json", depths=[1, 1, 1, 1])
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (shown, level)
    logging.enable_progress_bar()
    logging.set_verbosity_warning()
