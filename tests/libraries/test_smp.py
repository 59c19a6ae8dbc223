"""Every segmentation-models-pytorch architecture, over encoders of different families and its interpolation options."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterable
from typing import Any

import pytest
import torch

import invariants
import upswap

smp = pytest.importorskip("segmentation_models_pytorch")

FEATURE = "feature => source"
GRAPH = "feature => graph"

UNET = {f"decoder.blocks.{i}": FEATURE for i in range(5)}
UNET_4 = {f"decoder.blocks.{i}": FEATURE for i in range(4)}
CONTEXT_4 = {f"decoder.psp:{i}": "context" for i in range(4)}

#: Every resize call of each architecture: its kind, and the route where it is swapped. Written by hand from SMP's source.
EXPECTED = {
    "Unet": UNET,
    "UnetPlusPlus": {
        f"decoder.blocks.x_{depth}_{layer}": FEATURE
        for depth, layer in [(0, 0), (1, 1), (2, 2), (3, 3), (0, 1), (1, 2), (2, 3), (0, 2), (1, 3), (0, 3), (0, 4)]
    },
    "MAnet": UNET,
    "Linknet": {},
    "FPN": {
        "decoder.p4": FEATURE,
        "decoder.p3": FEATURE,
        "decoder.p2": FEATURE,
        "decoder.seg_blocks.0.block.0": FEATURE,
        "decoder.seg_blocks.0.block.1": FEATURE,
        "decoder.seg_blocks.0.block.2": FEATURE,
        "decoder.seg_blocks.1.block.0": FEATURE,
        "decoder.seg_blocks.1.block.1": FEATURE,
        "decoder.seg_blocks.2.block.0": FEATURE,
        "segmentation_head.1": "logits",
    },
    "PSPNet": {**{f"decoder.psp.blocks.{i}": "context" for i in range(4)}, "segmentation_head.1": "logits"},
    "DeepLabV3": {"decoder.aspp.convs.4": "context", "segmentation_head.1": "logits"},
    "DeepLabV3Plus": {
        "decoder.aspp.0.convs.4": "context",
        "decoder.up": "feature => module",
        "segmentation_head.1": "logits",
    },
    "PAN": {
        "decoder.fpa:0": "context",
        "decoder.fpa:1": FEATURE,
        "decoder.fpa:2": FEATURE,
        "decoder.fpa:3": "gate",
        "decoder.gau3": "identity",
        "decoder.gau2": FEATURE,
        "decoder.gau1": FEATURE,
        "segmentation_head.1": "logits",
    },
    "UPerNet": {
        **CONTEXT_4,
        "decoder.fpn_lateral_blocks.0": GRAPH,
        "decoder.fpn_lateral_blocks.1": GRAPH,
        "decoder.fpn_lateral_blocks.2": GRAPH,
        "decoder:0": FEATURE,
        "decoder:1": FEATURE,
        "decoder:2": FEATURE,
        "decoder:3": "identity",
        "segmentation_head.1": "logits",
    },
    "Segformer": {
        "decoder:0": FEATURE,
        "decoder:1": FEATURE,
        "decoder:2": FEATURE,
        "decoder:3": "identity",
        "segmentation_head.1": "logits",
    },
    "DPT": {**{f"decoder.fusion_blocks.{i}": FEATURE for i in range(4)}, "segmentation_head": "logits"},
}
# Encoders with a feature map at half the size give SMP's SegFormer decoder one more, which it makes smaller.
SEGFORMER_CNN = {**EXPECTED["Segformer"], "decoder:4": "downsample"}
SEGFORMER_CNN["segmentation_head.1"] = SEGFORMER_CNN.pop("segmentation_head.1")

# Encoders without a feature map at half the size leave Unet++ blocks of no channels, which throw their resized map away.
UNETPLUSPLUS_NO_HALF = {
    **EXPECTED["UnetPlusPlus"],
    **{f"decoder.blocks.x_{depth}_3": "other" for depth in (3, 2, 1)},
}
SPECIAL = {
    ("Segformer", "resnet18"): SEGFORMER_CNN,
    ("Segformer", "efficientnet-b0"): SEGFORMER_CNN,
    **{("UnetPlusPlus", encoder): UNETPLUSPLUS_NO_HALF for encoder in ("tu-convnext_atto", "tu-pvt_v2_b0")},
}

ENCODERS = [
    "resnet18",
    "mit_b0",
    "efficientnet-b0",
    "tu-convnext_atto",
    "tu-pvt_v2_b0",
]
#: What SMP itself refuses to build, or what the encoder does not have (dilation).
REFUSED = {
    *((arch, "mit_b0") for arch in ("UnetPlusPlus", "Linknet")),
    *((arch, enc) for arch in ("DeepLabV3", "DeepLabV3Plus", "PAN") for enc in ENCODERS[4:]),
}
# An encoder of one fixed size, where there is no second size to learn from: slow, so on the architectures it matters to.
FIXED_SIZE = "tu-swin_tiny_patch4_window7_224"
CASES = [
    *((arch, enc) for arch in EXPECTED if arch != "DPT" for enc in ENCODERS if (arch, enc) not in REFUSED),
    *((arch, FIXED_SIZE) for arch in ("Unet", "PSPNet", "UPerNet")),
    ("DPT", "tu-vit_tiny_patch16_224"),
]
#: The decoders are what is rewritten: each with one encoder, and each encoder with some of them.
QUICK = {
    *((arch, "resnet18") for arch in EXPECTED if arch not in ("DPT", "UnetPlusPlus")),
    ("Unet", "mit_b0"),
    ("Segformer", "mit_b0"),
    ("FPN", "efficientnet-b0"),
    ("UnetPlusPlus", "tu-convnext_atto"),
    ("DPT", "tu-vit_tiny_patch16_224"),
}
NOTHING = [case for case in CASES if not any("=>" in kind for kind in EXPECTED[case[0]].values())]
FIXED = {FIXED_SIZE: 224, "tu-vit_tiny_patch16_224": 224}


def some_slow(cases: Iterable[tuple[str, str]], quick: Collection[tuple[str, str]]) -> list[Any]:
    """The cases, those that are not quick marked as slow."""
    return [pytest.param(*case, marks=() if case in quick else pytest.mark.slow) for case in cases]


def build(arch: str, encoder: str, **options: object) -> torch.nn.Module:
    torch.manual_seed(0)
    if arch == "DPT":  # narrower than the published model, for time
        options = {"decoder_intermediate_channels": (32, 48, 64, 64), "decoder_fusion_channels": 32, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what SMP and timm say of their own settings
        return getattr(smp, arch)(encoder, encoder_weights=None, classes=3, **options).eval()


def images(encoder: str, arch: str) -> list[torch.Tensor]:
    torch.manual_seed(1)
    side = FIXED.get(encoder)
    if side:
        return [torch.randn(batch, 3, side, side) for batch in (1, 2, 3)]
    # PAN's attention pools its map three times; the odd sizes are for models that take them, the others refuse alike.
    small = 256 if arch == "PAN" else 64
    return [
        torch.randn(1, 3, small, small),
        torch.randn(2 if arch == "PAN" else 3, 3, small, small + 32),
        torch.randn(1, 3, small + 33, small + 17),
        torch.randn(3, 3, small, small),
    ]


@pytest.mark.parametrize(("arch", "encoder"), some_slow(CASES, {*QUICK, *NOTHING}))
def test_inspect_gives_the_expected_sites(arch: str, encoder: str) -> None:
    expected = SPECIAL.get((arch, encoder), EXPECTED[arch])
    model = build(arch, encoder)
    before = copy.deepcopy(model)
    plan = upswap.inspect(model)
    assert invariants.decisions(plan) == expected
    assert all(site.location is None or site.location.line > 0 for site in plan.sites)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert upswap.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("arch", "encoder"), some_slow((case for case in CASES if case not in NOTHING), QUICK))
def test_patched_model(arch: str, encoder: str) -> None:
    original = build(arch, encoder)
    patched = upswap.patch(copy.deepcopy(original))
    batches = images(encoder, arch)
    invariants.check_step_0(original, patched, batches)
    invariants.check_keys(original, patched)
    invariants.check_training(original, patched, batches[1])
    invariants.check_learning(patched, batches[1])
    invariants.check_repatch(patched)
    invariants.check_unpatch(original, patched, batches[0])


@pytest.mark.parametrize(("arch", "encoder"), NOTHING)
def test_nothing_to_swap_says_what_there_is_instead(arch: str, encoder: str) -> None:
    model = build(arch, encoder)
    with pytest.raises(upswap.NothingToSwapError) as error:
        upswap.patch(model)
    assert ("ConvTranspose2d" if arch == "Linknet" else "logits") in str(error.value)
    assert "_upswap_plan" not in model.__dict__


MODES = ["nearest", "nearest-exact", "bilinear", "bicubic", "area"]


@pytest.mark.parametrize(
    ("arch", "mode"),
    some_slow(
        [*((arch, mode) for arch in ("Unet", "MAnet", "FPN", "PAN") for mode in MODES), ("UnetPlusPlus", "bicubic")],
        {("FPN", "bilinear"), ("FPN", "bicubic"), ("FPN", "area"), ("MAnet", "nearest-exact")},
    ),
)
def test_every_interpolation_mode(arch: str, mode: str) -> None:
    if arch == "FPN" and mode == "bilinear":
        options = {"decoder_interpolation": mode, "decoder_merge_policy": "cat"}
    else:
        options = {"decoder_interpolation": mode}
    original = build(arch, "resnet18", **options)
    patched = upswap.patch(copy.deepcopy(original), style="pl" if mode == "bicubic" else "lp", dyscope=mode == "area")
    assert mode in {site.mode for site in upswap.plan_of(patched).swapped}
    batches = images("resnet18", arch)
    invariants.check_step_0(original, patched, batches)
    invariants.check_training(original, patched, batches[1])
    invariants.check_learning(patched, batches[1])


@pytest.mark.parametrize("style", ["lp", "pl"])
@pytest.mark.parametrize("dyscope", [False, True])
@pytest.mark.parametrize("arch", ["Unet", "UPerNet"])
def test_every_variant(arch: str, style: str, dyscope: bool) -> None:
    original = build(arch, "resnet18")
    patched = upswap.patch(copy.deepcopy(original), style=style, dyscope=dyscope)
    assert {module.style for module in upswap.upsamplers(patched).values()} == {style}
    batches = images("resnet18", arch)
    invariants.check_step_0(original, patched, batches)
    invariants.check_learning(patched, batches[1])


@pytest.mark.parametrize(
    ("arch", "depth"),
    [("Unet", 3), ("Unet", 4), ("FPN", 4), ("UPerNet", 3), ("UPerNet", 4), ("Segformer", 4), ("PAN", 3), ("PAN", 4)],
)
def test_shallower_encoders(arch: str, depth: int) -> None:
    options: dict[str, object] = {"encoder_depth": depth}
    if arch == "Unet":
        options["decoder_channels"] = (64, 32, 16, 16)[:depth]
    original = build(arch, "resnet18", **options)
    patched = upswap.patch(copy.deepcopy(original))
    invariants.check_step_0(original, patched, images("resnet18", arch))


def test_an_auxiliary_head_and_attention() -> None:
    options = {"aux_params": {"classes": 2}, "decoder_attention_type": "scse"}
    original = build("Unet", "resnet18", **options)
    patched = upswap.patch(copy.deepcopy(original))
    invariants.check_step_0(original, patched, images("resnet18", "Unet"))
    masks, labels = patched(torch.randn(2, 3, 64, 64))
    assert masks.shape == (2, 3, 64, 64)
    assert labels.shape == (2, 2)


@pytest.mark.parametrize(
    "arch", ["UPerNet", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("Unet", "FPN", "Segformer"))]
)
def test_compiles_and_exports_as_the_original_does(arch: str) -> None:
    original = build(arch, "resnet18")
    patched = upswap.patch(copy.deepcopy(original))
    small, large = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 96, 128)
    torch._dynamo.reset()
    compiled = torch.compile(patched, fullgraph=True, dynamic=True, backend="eager")
    auto = torch.export.Dim.AUTO
    exported = torch.export.export(patched, (small,), dynamic_shapes=({0: auto, 2: auto, 3: auto},)).module()
    with torch.no_grad():
        for image in (small, large):
            invariants.assert_close([compiled(image)], [original(image)], 1e-5)
            invariants.assert_close([exported(image)], [original(image)], 1e-5)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("arch", ["Unet", "PAN", "FPN"])
def test_a_trace_of_a_trained_model_holds_at_other_sizes(arch: str) -> None:
    """Traced sizes are tensors. PAN's are no multiples of its maps' at one image and are so at another."""
    patched = upswap.patch(build(arch, "resnet18")).eval()
    with torch.no_grad():
        for name, parameter in patched.named_parameters():
            if ".offset." in name:
                parameter.normal_(std=0.05)
        traced = torch.jit.trace(patched, torch.randn(1, 3, 128, 128))
        for image in (torch.randn(1, 3, 128, 128), torch.randn(2, 3, 192, 160)):
            invariants.assert_close([traced(image)], [patched(image)], 1e-5)


@pytest.mark.parametrize("arch", ["Unet", "FPN", "UPerNet"])
def test_autocast_and_channels_last(arch: str) -> None:
    original = build(arch, "resnet18")
    patched = upswap.patch(copy.deepcopy(original))
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        invariants.assert_close([patched(image)], [original(image)], 5e-2)  # bfloat16 keeps 8 bits
    image = image.to(memory_format=torch.channels_last)
    original.to(memory_format=torch.channels_last)
    patched.to(memory_format=torch.channels_last)
    with torch.no_grad():
        out, expected = patched(image), original(image)
    invariants.assert_close([out], [expected], 1e-5)
    assert out.stride() == expected.stride()
