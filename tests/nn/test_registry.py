"""Upsamplers from elsewhere: the example in the documentation, the packages that announce one, and what is declared."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import upswap
from upswap.apps.cli import run
from upswap.nn.configs import UpsamplerConfig
from upswap.nn.registry import _FACTORIES, ENTRY_POINTS, OWN, config_class, is_exact, upsampler_names
from upswap.plan.plan import Plan
from upswap.plan.site import Site
from upswap.surgery.options import make_options

PAGE = Path(__file__).parents[2] / "docs" / "upsamplers.md"
IMAGE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def blocks(language: str) -> list[str]:
    """The code of that language in the page's part on upsamplers of one's own."""
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text().partition("## Your own")[2], re.DOTALL)


def install(folder: Path, package: str, announced: dict[str, str], code: str | None = None) -> None:
    """What `pip install` leaves of a package of one module: the module, and its dist-info."""
    if code is not None:
        (folder / f"{package}.py").write_text(code)
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in announced.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{ENTRY_POINTS}]", *lines, ""]))


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that packages can be installed in; afterwards none of them was ever imported."""
    for name in OWN:  # a module registers once, when it is imported
        config_class(name)
    known, modules = dict(_FACTORIES), set(sys.modules)
    folder = tmp_path / "site-packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(tmp_path)
    yield folder
    known |= {name: _FACTORIES[name] for name in OWN if name in _FACTORIES}  # these stay imported
    _FACTORIES.clear()
    _FACTORIES.update(known)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) == str(folder / f"{name}.py"):
            del sys.modules[name]


@pytest.fixture
def refined(packages: Path) -> Path:
    """The page's example, installed as the page says."""
    project = tomllib.loads(blocks("toml")[0])["project"]
    announced = project["entry-points"][ENTRY_POINTS]
    install(packages, project["name"], announced, blocks("python")[0])
    return packages


def forget(package: str) -> None:
    """As in a process that has not imported it."""
    del _FACTORIES[package], sys.modules[package]


class Host(nn.Module):
    """A resize by size, one by factor and a layer, in one mode."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.stem = nn.Conv2d(3, 4, 3, stride=4)
        self.layer = nn.Upsample(scale_factor=2, mode=mode)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = F.interpolate(self.layer(self.stem(image)), scale_factor=1.5, mode=self.mode)
        return self.last(F.interpolate(x, size=image.shape[-2:], mode=self.mode))


def unet() -> nn.Module:
    torch.manual_seed(0)
    return smp.Unet("resnet18", encoder_weights=None, classes=2).eval()


def moved(model: nn.Module) -> nn.Module:
    """With upsamplers that are not what they started as."""
    with torch.no_grad():
        for parameter in upswap.parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return model


# ---- the page's example


def test_the_pages_code_runs(refined: Path) -> None:
    first, *others = blocks("python")
    assert first.startswith("# refined.py\n")
    assert others
    for block in others:
        exec(compile(block, str(PAGE), "exec"), {})


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic", "area"])
def test_the_pages_example_is_exact_at_step_0_and_trains(refined: Path, mode: str) -> None:
    torch.manual_seed(0)
    original = Host(mode).eval()
    model = upswap.patch(copy.deepcopy(original), torch.randn(1, 3, 37, 41), upsampler="refined")
    assert len(upswap.upsamplers(model)) == 3
    assert {type(module).__name__ for module in upswap.upsamplers(model).values()} == {"Refined"}
    assert upswap.verify(original, model, IMAGE).ok
    model(IMAGE).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in upswap.parameters(model))
    upswap.unpatch(model)
    assert torch.equal(model(IMAGE), original(IMAGE))


def test_a_safetensors_needs_the_package_installed_and_no_trust(refined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(upswap.patch(unet(), upsampler="refined"))
    upswap.save(model, "unet.safetensors")
    forget("refined")
    loaded = upswap.load("unet.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), model(IMAGE))
    forget("refined")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(refined)])
    with pytest.raises(upswap.OptionError, match="no upsampler named 'refined'"):
        upswap.load("unet.safetensors")


def test_a_pt_needs_trust_in_its_class(refined: Path) -> None:
    model = moved(upswap.patch(unet(), upsampler="refined"))
    with pytest.warns(upswap.UpswapWarning, match=r"refuse it.*\n.*refined\.Refined"):
        upswap.save(model, "unet.pt")
    with pytest.raises(upswap.UntrustedFileError, match="--trust refined"):
        upswap.load("unet.pt")
    forget("refined")
    loaded = upswap.load("unet.pt", trust=["refined"])
    with torch.no_grad():
        assert torch.equal(loaded(IMAGE), model(IMAGE))
        assert torch.equal(upswap.unpatch(loaded)(IMAGE), unet()(IMAGE))


def test_the_command_line_finds_it(refined: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(unet(), "unet.pt")
    assert run(["convert", "unet.pt", "--upsampler", "refined", "-o", "out.safetensors"]) == 0
    assert "step-0 difference" in capsys.readouterr().out
    assert run(["verify", "unet.pt", "out.safetensors"]) == 0
    assert run(["inspect", "unet.pt", "--upsampler", "refind"]) == 2
    error = capsys.readouterr().err
    assert "no upsampler named 'refind'; near it: refined, freqfusion; known are carafe, dysample, fade, " in error
    assert ", refined, sapa-b" in error


# ---- names


def make(upsampler: str) -> nn.Module:
    return upswap.patch(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3)), IMAGE, upsampler=upsampler
    )


def test_a_package_is_imported_when_its_name_is_asked_for_and_not_before(refined: Path) -> None:
    assert {"carafe", "dysample", "refined"} <= set(upsampler_names())
    make("carafe")
    assert "refined" not in sys.modules
    make("refined")
    assert "refined" in sys.modules


def test_a_name_that_nobody_has() -> None:
    with pytest.raises(upswap.OptionError, match=r"no upsampler named 'refined'; known are carafe, dysample\b"):
        make("refined")


def test_a_package_that_does_not_import(packages: Path) -> None:
    install(packages, "broken", {"mine": "broken"}, "import nowhere_to_be_found\n")
    with pytest.raises(
        upswap.OptionError, match=r"importing broken, which broken names for it.*ModuleNotFoundError.*nowhere"
    ):
        make("mine")


def test_a_package_that_registers_something_else(packages: Path) -> None:
    install(packages, "other", {"mine": "other"}, "import upswap\nupswap.register_upsampler('theirs')(None)\n")
    with pytest.raises(upswap.OptionError, match=r"other, which other names for it, .*register_upsampler\('mine'\)"):
        make("mine")


def test_two_packages_of_one_name(packages: Path) -> None:
    for package in ("one", "two"):
        install(packages, package, {"mine": package}, "raise RuntimeError('imported')\n")
    with pytest.raises(upswap.OptionError, match=r"several .*: one \(one\), two \(two\); import the one meant"):
        make("mine")


# ---- exact or not


class Blurred(nn.Module):
    def forward(self, x: Tensor, size: object = None, scale_factor: object = None) -> Tensor:
        return F.avg_pool2d(F.interpolate(x, scale_factor=2.0), 3, stride=1, padding=1)


@dataclasses.dataclass(frozen=True)
class BlurredConfig(UpsamplerConfig):
    init: str = "match"


def blurred(site: Site, config: object) -> nn.Module:
    return Blurred()


def test_an_upsampler_is_held_to_what_it_declares(packages: Path) -> None:
    upswap.register_upsampler("silent", options=BlurredConfig)(blurred)
    upswap.register_upsampler("honest", options=BlurredConfig, exact=False)(blurred)
    upswap.register_upsampler("sometimes", options=BlurredConfig, exact=lambda config: config.init == "match")(blurred)
    for name, init, exact in (
        ("silent", "match", True),
        ("honest", "match", False),
        ("sometimes", "match", True),
        ("sometimes", "paper", False),
    ):
        assert is_exact(Plan("package.Model", make_options(name, init=init), ())) is exact

    original = unet()
    for name, init, held in (("silent", "paper", True), ("honest", "match", False), ("sometimes", "paper", False)):
        model = upswap.patch(copy.deepcopy(original), upsampler=name, init=init)
        report, plan = upswap.verify(original, model), upswap.plan_of(model)
        assert not report.ok
        if held:
            with pytest.raises(upswap.VerificationError, match="does not compute what the original did"):
                report.check(plan)
        else:
            report.check(plan)


# ---- outside of a model


def test_the_pages_upsamplers_for_a_model_of_ones_own_run() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text().partition("## Your own")[0], re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert torch.equal(names["larger"], F.interpolate(names["x"], scale_factor=2, mode="bilinear"))
    assert torch.equal(names["changed"], names["skip"])


def test_any_is_made_by_its_name() -> None:
    x, guide = torch.randn(1, 8, 5, 6), torch.randn(1, 4, 10, 12)
    for name, options in (
        ("dysample", {"style": "pl", "groups": 2}),
        ("carafe", {"up_kernel": 3}),
        ("lda_aqu", {"n_groups": 1}),
        ("fade", {"gating": False}),
        ("fade-lite", {"gating": False, "up_kernel_size": 3}),
        ("sapa-b", {"form": "linear"}),
        ("freqfusion", {"compressed": 8, "hamming": False, "norm": False, "resample": False, "padding": "reflect"}),
    ):
        takes_guide = name not in ("dysample", "carafe", "lda_aqu")
        module = upswap.create_upsampler(name, 8, 4 if takes_guide else None, mode="nearest", **options)
        more = {"guide": guide} if takes_guide else {}
        assert torch.allclose(module(x, **more), F.interpolate(x, scale_factor=2), atol=1e-5), name
        assert all(getattr(module, option) == value for option, value in options.items())
        published = upswap.create_upsampler(name, 8, 4 if takes_guide else None, init="paper", **options)
        assert not torch.allclose(published(x, **more), F.interpolate(x, scale_factor=2, mode="bilinear"), atol=1e-6), (
            name
        )


def test_what_cannot_be_made_is_said() -> None:
    for call, says in (
        (lambda: upswap.create_upsampler("fad", 8), "no upsampler named 'fad'"),
        (lambda: upswap.create_upsampler("fade", 8, gate=False), "has no option 'gate'; near it: gating"),
        (lambda: upswap.create_upsampler("carafe", 8, 8), "'carafe' takes no guide: leave guide_channels out"),
        (lambda: upswap.create_upsampler("lda_aqu", 6, n_groups=4), "n_groups 1, for 6 channels. Give these options"),
        (lambda: upswap.create_upsampler("dysample", 8, mode="linear"), "mode='linear' is not one of"),
        (lambda: upswap.create_upsampler("dysample", 0), "channels must be a positive int"),
        (lambda: upswap.create_upsampler("dysample", 8, scale=0.5), "scale must be"),
    ):
        with pytest.raises(upswap.OptionError, match=says):
            call()


@dataclasses.dataclass(frozen=True)
class AddedConfig(UpsamplerConfig):
    by: float = 1.0


class Added(nn.Module):
    def __init__(self, guide_channels: int, by: float) -> None:
        super().__init__()
        self.guide_channels, self.by = guide_channels, by

    def forward(self, x: Tensor, size: Any = None, scale_factor: Any = None, guide: Any = None) -> Tensor:
        return F.interpolate(x, guide.shape[-2:]) + self.by * guide.mean(1, True)


def added(site: Site, config: AddedConfig, guide_channels: int) -> nn.Module:
    return Added(guide_channels, config.by)


@pytest.fixture
def of_ones_own(packages: Path) -> None:
    """A guided one, registered."""
    upswap.register_upsampler("added", options=AddedConfig, exact=False, guided=True)(added)


def test_a_guided_one_of_ones_own(of_ones_own: None) -> None:
    module = upswap.create_upsampler("added", 8, 3, by=2.0)
    assert (module.guide_channels, module.by) == (3, 2.0)
    assert upswap.create_upsampler("added", 8).guide_channels == 8
    assert module(torch.zeros(1, 8, 2, 2), guide=torch.ones(1, 3, 4, 4)).eq(2).all()
    with pytest.raises(upswap.OptionError, match="has no option 'init'"):
        upswap.create_upsampler("added", 8, init="paper")


@pytest.mark.parametrize("name", ["fade", "fade-lite", "sapa-b", "freqfusion", "added"])
def test_a_plan_that_gives_no_guide_to_one_that_takes_it(name: str, of_ones_own: None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3))
    plan = upswap.inspect(model, IMAGE, upsampler="carafe").to_dict()
    plan["options"] |= {"upsampler": name, "config": {}}
    plan["sites"] = [{**site, "config": {}, "settings": {}} for site in plan["sites"]]
    with pytest.raises(upswap.UpswapError, match=f"{name} takes a guide, and it has none"):
        upswap.patch(model, plan=Plan.from_dict(plan))
    assert type(model[1]) is nn.Upsample
