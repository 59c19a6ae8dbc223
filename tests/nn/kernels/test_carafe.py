"""CARAFE against its definition, written out in loops, and as an upsampler in a model."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

import upswap
from releases import skip_where_export_ties_sizes
from upswap.apps.cli import run
from upswap.nn import CARAFE
from upswap.nn.composed import Cascade
from upswap.nn.registry import is_exact
from upswap.plan.plan import Plan
from upswap.surgery.options import make_options

HALVES = [torch.float16, torch.bfloat16]


def build(channels: int = 6, scale: Any = 2, **options: Any) -> CARAFE:
    """The published operator, with kernels that are far from equal."""
    torch.manual_seed(0)
    module = CARAFE(channels, scale, **{"compressed_channels": 8, "init": "paper", **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def features(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def defined(module: CARAFE, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """The paper's equations in float64, one output pixel and one tap at a time."""
    module, x = copy.deepcopy(module).double(), x.double()
    batch, channels, height, width = x.shape
    side, (vertical, horizontal) = module.up_kernel, module.kernel_scale
    compressor, encoder = module.channel_compressor, module.content_encoder
    encoded = F.conv2d(x, compressor.weight, compressor.bias)
    encoded = F.conv2d(encoded, encoder.weight, encoder.bias, padding=module.encoder_kernel // 2)
    logits = torch.empty(batch, side * side, vertical * height, horizontal * width, dtype=torch.float64)
    for tap in range(side * side):
        for i in range(vertical * height):
            for j in range(horizontal * width):
                channel = (tap * vertical + i % vertical) * horizontal + j % horizontal
                logits[:, tap, i, j] = encoded[:, channel, i // vertical, j // horizontal]
    if size is not None:
        logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    out = torch.zeros(batch, channels, *logits.shape[2:], dtype=torch.float64)
    for b in range(batch):
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                exponentials = logits[b, :, i, j].exp()
                row, column = i * height // out.shape[2], j * width // out.shape[3]
                for n in range(side):
                    for m in range(side):
                        y, z = row + n - side // 2, column + m - side // 2
                        if 0 <= y < height and 0 <= z < width:
                            weight = exponentials[n * side + m] / exponentials.sum()
                            out[b, :, i, j] += weight * x[b, :, y, z]
    return out


# ---- the definition


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, None),
        ({"scale": 3, "up_kernel": 3}, None),
        ({"scale": (3, 2)}, None),
        ({"scale": (1, 4), "up_kernel": 7, "encoder_kernel": 5}, None),
        ({"up_kernel": 1, "encoder_kernel": 1}, None),
        ({}, (9, 13)),
        ({}, (5, 6)),
        ({}, (16, 19)),
        ({"scale": (3, 2), "up_kernel": 3}, (14, 12)),
        ({"scale": 1.5}, (7, 9)),
    ],
    ids=str,
)
def test_it_is_what_the_paper_defines(options: dict[str, Any], size: tuple[int, int] | None) -> None:
    module, x = build(**options), features(2, 6, 5, 6)
    expected = defined(module, x, size)
    got = copy.deepcopy(module).double()(x.double(), size)
    assert (got - expected).abs().max() < 1e-12
    assert (module(x, size) - expected).abs().max() < 1e-5


def test_targets_that_are_no_multiple_come_from_the_modules_own_scale_too() -> None:
    module, x = build(scale=1.5), features(1, 6, 5, 6)
    assert torch.equal(module(x), module(x, (7, 9)))
    assert torch.equal(module(x, None, (2, 1.5)), module(x, (10, 9)))
    assert torch.equal(build()(x), build()(x, None, 2.0))
    assert torch.equal(build()(x, 12), build()(x, (12, 12)))


@pytest.mark.parametrize("tap", range(9))
def test_a_kernel_of_one_tap_is_a_shift(tap: int) -> None:
    """Taps are numbered row by row, and sub-pixels within each: the order of the authors' weights."""
    module, x = CARAFE(2, 2, up_kernel=3, init="paper"), features(1, 2, 4, 5)
    with torch.no_grad():
        module.content_encoder.weight.zero_()
        bias = torch.zeros(9, 4)
        bias[tap, 0] = bias[4, 1:] = 100.0  # the other three sub-pixels copy their pixel
        module.content_encoder.bias.copy_(bias.flatten())
    out = module(x)
    n, m = divmod(tap, 3)
    assert torch.allclose(out[..., ::2, ::2], F.pad(x, (1, 1, 1, 1))[..., n : n + 4, m : m + 5])
    for i, j in ((0, 1), (1, 0), (1, 1)):
        assert torch.allclose(out[..., i::2, j::2], x)


def test_the_state_dict_is_that_of_the_authors_module() -> None:
    """Names and shapes of mmcv's CARAFEPack(256, 2), as in the weights of mmdet's FPN_CARAFE."""
    released = {
        "channel_compressor.weight": torch.rand(64, 256, 1, 1),
        "channel_compressor.bias": torch.rand(64),
        "content_encoder.weight": torch.rand(100, 64, 3, 3),
        "content_encoder.bias": torch.rand(100),
    }
    module = CARAFE(256, 2, init="paper")
    assert list(module.state_dict()) == list(released)
    module.load_state_dict(released, strict=True)
    assert CARAFE(256, 2).state_dict().keys() - released.keys() == {"gain"}


def test_initial_weights_are_drawn_as_the_authors_do() -> None:
    torch.manual_seed(0)
    module = CARAFE(256, 2)
    compressor, encoder = module.channel_compressor, module.content_encoder
    bound = math.sqrt(6 / (256 + 64))  # Glorot and Bengio, uniform
    assert 0.98 * bound < compressor.weight.abs().max() <= bound
    assert compressor.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert encoder.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert encoder.weight.abs().max() > 0.003  # normal, not uniform
    assert not compressor.bias.any()
    assert not encoder.bias.any()


def kaiming(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_uniform_(module.weight)


def test_initialisation_by_class_leaves_it_alone() -> None:
    module = build()
    before = copy.deepcopy(module.state_dict())
    module.apply(kaiming)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_files_of_before_have_convolutions() -> None:
    module, x = build(), features(2, 6, 5, 6)
    old = copy.deepcopy(module)
    del old._parameters["gain"], old.init
    old = pickle.loads(pickle.dumps(old))
    old.channel_compressor, old.content_encoder = nn.Conv2d(6, 8, 1), nn.Conv2d(8, 100, 3, padding=1)
    old.load_state_dict(module.state_dict())
    assert torch.equal(old(x), module(x))
    old.content_encoder = nn.Identity()
    with pytest.raises(upswap.OptionError, match=r"CARAFE\.content_encoder was replaced by a Identity"):
        old(x)


def test_as_published_it_starts_as_a_blur_and_not_as_the_original() -> None:
    x = features(1, 32, 8, 8)
    out = CARAFE(32, 2, init="paper")(x)
    nearest = F.interpolate(x, scale_factor=2)
    mean = F.interpolate(F.avg_pool2d(x, 5, stride=1, padding=2), scale_factor=2)  # zeros outside count
    assert (out - mean).abs().max() < 0.05
    assert (out - nearest).abs().max() > 1


# ---- calls as a patched model makes them


@pytest.mark.parametrize(
    ("mode", "align_corners"),
    [("nearest", False), ("nearest-exact", False), ("area", False), ("bilinear", True), ("bicubic", False)],
)
def test_a_smaller_target_is_the_original_resize(mode: str, align_corners: bool) -> None:
    module, x = build(mode=mode, align_corners=align_corners), features(2, 6, 8, 9)
    align = align_corners if mode in ("bilinear", "bicubic") else None
    for size in ((4, 5), (7, 30), (30, 7)):
        assert torch.equal(module(x, size), F.interpolate(x, size, mode=mode, align_corners=align))
    expected = F.interpolate(x, scale_factor=(0.5, 2), mode=mode, align_corners=align)
    assert torch.equal(module(x, None, (0.5, 2)), expected)


def test_what_it_cannot_take_is_said() -> None:
    module = build()
    with pytest.raises(upswap.ShapeError, match=r"shape \(B, 6, H, W\), got \(1, 5, 4, 4\)"):
        module(torch.zeros(1, 5, 4, 4))
    with pytest.raises(upswap.ShapeError, match=r"\(6, 4, 4\)"):
        module(torch.zeros(6, 4, 4))
    with pytest.raises(upswap.ShapeError, match="int64"):
        module(torch.zeros(1, 6, 4, 4, dtype=torch.long))
    with pytest.raises(upswap.OptionError, match="not both"):
        module(torch.zeros(1, 6, 4, 4), (8, 8), 2)
    with pytest.raises(upswap.OptionError, match="up_kernel must be odd"):
        CARAFE(6, 2, up_kernel=4)
    with pytest.raises(upswap.OptionError, match="encoder_kernel must be odd"):
        CARAFE(6, 2, encoder_kernel=2)
    with pytest.raises(upswap.OptionError, match="scale"):
        CARAFE(6, 0.5)
    with pytest.raises(upswap.OptionError, match="mode='linear'"):
        CARAFE(6, 2, mode="linear")


@pytest.mark.parametrize("size", [None, (9, 13), (12, 12)])
def test_the_memory_format_stays(size: tuple[int, int] | None) -> None:
    module, x = build(), features(2, 6, 6, 6)
    last = x.to(memory_format=torch.channels_last)
    assert module(x, size).is_contiguous()
    assert module(last, size).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(module(last, size), module(x, size), atol=1e-5)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [None, (11, 13)])
@torch.no_grad()
def test_in_half_precision_only_the_convolutions_are(size: tuple[int, int] | None, dtype: torch.dtype) -> None:
    module, x = build().to(dtype), features(2, 6, 6, 6).to(dtype)
    got = module(x, size)
    assert got.dtype == dtype
    exact = defined(module, x, size)
    # The logits, of magnitude 10 here, are rounded twice; a kernel moves by that much times what it weighs.
    assert (got - exact).abs().max() < 40 * torch.finfo(dtype).eps
    wide = copy.deepcopy(module).float()
    wide._logits = lambda _: module._logits(x)  # type: ignore[method-assign]
    assert torch.equal(wide(x.float(), size).to(dtype), got)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("size", [None, (9, 31)])
def test_under_autocast_the_output_and_gradients_have_the_right_dtypes(
    size: tuple[int, int] | None, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    before, module = nn.Conv2d(3, 6, 1), build()
    with torch.autocast("cpu", dtype=dtype):
        x = before(torch.randn(1, 3, 4, 12))
        out = module(x, size)
        assert x.dtype == out.dtype == dtype
        wide = module(x.float(), size)
        assert wide.dtype == torch.float32
        assert module._logits(x).dtype == module._logits(x.float()).dtype == dtype
    assert (out.float() - wide).abs().max() <= 2 * torch.finfo(dtype).eps * wide.abs().max()
    out.float().square().mean().backward()
    for parameter in [*before.parameters(), *module.parameters()]:
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.any()


# ---- gradients and graphs


@pytest.mark.parametrize("size", [None, (7, 5)])
def test_gradients(size: tuple[int, int] | None) -> None:
    module = build(3, up_kernel=3, compressed_channels=2).double()
    names = [name for name, _ in module.named_parameters()]
    x = features(2, 3, 3, 2).double().requires_grad_()

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, size))

    assert torch.autograd.gradcheck(call, (x, *module.parameters()))


# Batch 1 is a graph of its own: torch.compile treats 0 and 1 as constants.
SIZES = [(2, 7, 9), (3, 12, 8), (2, 16, 16), (5, 23, 21), (2, 9, 7)]


@pytest.mark.parametrize(
    "how", ["own", "size", *(pytest.param(how, marks=pytest.mark.slow) for how in ("own x1.5", "scale_factor"))]
)
def test_new_sizes_do_not_recompile(how: str) -> None:
    torch._dynamo.reset()
    module = build(scale=1.5 if how == "own x1.5" else 2)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    weight = module.content_encoder.weight
    for step, (batch, height, width) in enumerate(SIZES):
        x, odd = features(batch, 6, height, width), step % 2
        given = {"scale_factor": {"scale_factor": 2}, "size": {"size": (2 * height - odd, 2 * width + odd)}}.get(
            how, {}
        )
        got, expected = compiled(x, **given), module(x, **given)
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)  # float32 is up to 6e-5 off float64 here
        gradients = [torch.autograd.grad(out.square().mean(), weight)[0] for out in (got, expected)]
        assert torch.allclose(*gradients, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("scale", [2, 1.5, (3, 2)], ids=str)
def test_export_with_dynamic_sizes(scale: Any) -> None:
    skip_where_export_ties_sizes(scale)
    module = build(scale=scale).eval()
    sizes = {0: Dim("batch"), 2: Dim("height", max=4096), 3: Dim("width", max=4096)}
    program = export(module, (features(2, 6, 7, 9),), dynamic_shapes=(sizes,))
    x = features(3, 6, 20, 13)
    assert torch.allclose(program.module()(x), module(x), atol=1e-6)


def test_export_with_a_size_from_another_tensor() -> None:
    class Fuse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.upsample = build()

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            return self.upsample(x, size=skip.shape[-2:])

    model = Fuse().eval()
    program = export(
        model,
        (features(2, 6, 7, 9), features(2, 1, 15, 17)),
        dynamic_shapes=({2: Dim("h"), 3: Dim("w")}, {2: Dim("skip_h"), 3: Dim("skip_w")}),
    )
    for target in ((40, 26), (41, 39)):
        inputs = features(2, 6, 20, 13), features(2, 1, *target)
        assert torch.allclose(program.module()(*inputs), model(*inputs), atol=1e-6)


def test_copies() -> None:
    module, x = build(mode="bilinear", align_corners=True), features(1, 6, 5, 4)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x, (9, 9)), module(x, (9, 9)))
        assert repr(twin) == repr(module)
    assert (
        "scale=2, up_kernel=5, encoder_kernel=3, compressed_channels=8, init=paper, mode=bilinear, align_corners=True"
        in repr(module)
    )


# ---- in a model


IMAGE = features(2, 3, 64, 64)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, classes=2).eval()


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A Unet with CARAFE, after two steps of training."""
    model = upswap.patch(unet(), upsampler="carafe").train()
    optimizer = torch.optim.SGD(upswap.param_groups(model, lr=0.1))
    before = [parameter.detach().clone() for parameter in upswap.parameters(model)]
    for _ in range(2):  # the first moves the gain alone
        optimizer.zero_grad()
        model(IMAGE).square().mean().backward()
        optimizer.step()
    for name, old, new in zip(_names(model), before, upswap.parameters(model), strict=True):
        assert not torch.equal(old, new), name
    return model.eval()


def _names(model: nn.Module) -> list[str]:
    return [f"{path}.{name}" for path, up in upswap.upsamplers(model).items() for name, _ in up.named_parameters()]


def test_every_site_gets_one() -> None:
    original = unet()
    model = upswap.patch(unet(), upsampler="carafe")
    modules = upswap.upsamplers(model)
    assert list(modules) == [f"decoder.blocks.{i}.upsample" for i in range(5)]
    assert all(type(module) is CARAFE and module.kernel_scale == (2, 2) for module in modules.values())
    assert torch.equal(model(IMAGE), original(IMAGE))
    published = upswap.patch(unet(), upsampler="carafe", init="paper")
    assert not torch.allclose(published(IMAGE), original(IMAGE), rtol=1e-2)


@pytest.mark.parametrize("name", ["unet.pt", "unet.safetensors"])
def test_it_is_saved_and_loaded(trained: nn.Module, name: str, tmp_path: Path) -> None:
    upswap.save(trained, tmp_path / name)  # filterwarnings=error: nothing is said of missing trust
    loaded = upswap.load(tmp_path / name)
    assert {type(module) for module in upswap.upsamplers(loaded).values()} == {CARAFE}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IMAGE), trained(IMAGE))


def test_undone_it_is_the_original() -> None:
    original, model = unet(), unet()
    upswap.unpatch(upswap.patch(model, upsampler="carafe"))
    assert list(model.state_dict()) == list(original.state_dict())
    with torch.no_grad():
        assert torch.equal(model(IMAGE), original(IMAGE))


def test_layers_odd_sizes_and_other_ratios() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
            self.layer = nn.Upsample(scale_factor=(4, 2), mode="bilinear")
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, image: Tensor) -> Tensor:
            x = self.stem(image)
            large = F.interpolate(x, size=image.shape[-2:])
            return self.last(self.layer(x))[..., ::2, :] + self.last(large)

    model = upswap.patch(Host(), features(1, 3, 16, 12), upsampler="carafe")
    assert type(model.layer) is CARAFE
    assert model.layer.kernel_scale == (4, 2)
    assert [type(module) for module in upswap.upsamplers(model).values()] == [CARAFE, CARAFE]
    assert model(features(2, 3, 16, 12)).shape == (2, 2, 16, 12)
    assert model.upsample(features(1, 8, 5, 5), (9, 9)).shape == (1, 8, 9, 9)


def test_cascades() -> None:
    host = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=4), nn.Conv2d(4, 4, 3))
    (chain,) = upswap.upsamplers(upswap.patch(host, features(1, 3, 9, 9), upsampler="carafe", cascade=True)).values()
    assert type(chain) is Cascade
    assert [(type(step), step.kernel_scale) for step in chain] == [(CARAFE, (2, 2))] * 2


@pytest.mark.parametrize(("name", "value"), [("style", "pl"), ("groups", 4), ("dyscope", True)])
def test_options_it_would_ignore_are_refused(name: str, value: Any) -> None:
    model = unet()
    with pytest.raises(upswap.OptionError, match=f"upsampler 'carafe' has no option '{name}'"):
        upswap.patch(model, upsampler="carafe", **{name: value})
    assert list(model.state_dict()) == list(unet().state_dict())


def test_it_is_declared_to_be_exact_where_it_is() -> None:
    for upsampler, options, exact in (
        ("carafe", {}, True),
        ("carafe", {"init": "paper"}, False),
        ("carafe", {"cascade": True}, False),
        ("dysample", {}, True),
        ("dysample", {"init": "paper"}, False),
        ("dysample", {"cascade": True}, False),
    ):
        assert is_exact(Plan("package.Model", make_options(upsampler, **options), ())) is exact


def test_its_own_options_reach_it() -> None:
    model = upswap.patch(unet(), upsampler="carafe", up_kernel=3, compressed_channels=16)
    up = model.decoder.blocks[0].upsample
    assert (up.up_kernel, up.channel_compressor.out_channels) == (3, 16)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(tmp_path / "unet.pt")
    spec = "smp:unet?encoder_name=resnet18"
    assert run(["convert", spec, "--upsampler", "carafe", "--input-size", "64", "-o", target]) == 0
    out, _ = capsys.readouterr()
    assert "step-0 difference" in out
    loaded = upswap.load(target)
    assert upswap.plan_of(loaded).options.upsampler == "carafe"
    assert run(["convert", spec, "--upsampler", "carafe", "--style", "pl", "--dry-run"]) == 2
    assert "style" in capsys.readouterr().err
