"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch
from torch import nn

import upswap
from upswap import verify
from upswap.apps.cli import run
from upswap.surgery import operation
from upswap.surgery.options import make_options

UNET = "smp:unet?encoder_name=resnet18&classes=2"
SITES = [f"decoder.blocks.{i}" for i in range(5)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path


@pytest.fixture
def unet(folder: Path) -> Path:
    """`unet.pt` in the current folder."""
    torch.manual_seed(0)
    torch.save(smp.Unet("resnet18", encoder_weights=None, classes=2), folder / "unet.pt")
    return folder / "unet.pt"


# ---- the main job


def test_convert_writes_a_model_that_is_the_same(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = unet.read_bytes()
    assert run(["convert", "unet.pt", "--style", "lp", "--groups", "4"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    converted = upswap.load("unet.upswap.pt")
    original = torch.load(unet, weights_only=False)
    assert list(upswap.upsamplers(converted)) == [f"{site}.upsample" for site in SITES]
    report = verify(original, converted)
    assert report.ok
    assert report.max_rel_diff <= 1e-5
    added = sum(parameter.numel() for parameter in upswap.parameters(converted))
    assert f"parameters added   {added:,} " in out
    assert re.search(r"step-0 difference  \d\.\de[+-]\d\d of the largest output", out)
    assert "saved              unet.upswap.pt" in out
    assert out.endswith('    import upswap\n    model = upswap.load("unet.upswap.pt")\n')
    assert unet.read_bytes() == before
    options = upswap.plan_of(converted).options
    assert (options.config["style"], options.config["groups"]) == ("lp", 4)


def test_every_option_reaches_the_plan(folder: Path) -> None:
    arguments = [
        "--style",
        "pl",
        "--groups",
        "2",
        "--dyscope",
        "--init",
        "paper",
        "--exclude",
        "*.4",
        "--exclude",
        "*.3",
    ]
    assert run(["convert", UNET, *arguments, "--include", "decoder.*", "--input-size", "96x64", "-o", "x.pt"]) == 0
    plan = upswap.plan_of(upswap.load("x.pt"))
    assert [site.name for site in plan.swapped] == SITES[:3]
    assert plan.options == make_options(
        style="pl", groups=2, dyscope=True, init="paper", include=("decoder.*",), exclude=("*.4", "*.3")
    )
    assert plan.inputs["args"]["tuple"][0]["tensor"] == [1, 3, 96, 64]


def test_options_of_any_upsampler_are_set_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", UNET, "--upsampler", "carafe", "--set", "up_kernel=3", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert (options["upsampler"], options["config"]["up_kernel"], options["config"]["encoder_kernel"]) == (
        "carafe",
        3,
        3,
    )


def test_options_of_single_sites(folder: Path) -> None:
    overrides = ["--override", SITES[0], "groups=8,style=pl", "--override", r"re:decoder\.blocks\.[12]", "groups=2"]
    assert run(["convert", UNET, *overrides, "-o", "x.pt"]) == 0
    model = upswap.load("x.pt")
    found = [(up.style, up.groups) for up in upswap.upsamplers(model).values()]
    assert found == [("pl", 8), ("lp", 2), ("lp", 2), ("lp", 4), ("lp", 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "groups"], "--set 'groups': write NAME=VALUE"),
        (["--set", "gruops=3"], "has no option 'gruops'; near it: groups"),
        (["--set", "groups=many"], "groups must be a whole number or None, got 'many'"),
        (["--override", "decoder.blocks.0", "style=zz"], "style='zz' is not one of lp, pl"),
        (["--override", "nowhere", "groups=2"], "override 'nowhere' matches none of the 5 sites"),
        (["--upsampler", "carafe", "--style", "pl"], "upsampler 'carafe' has no option 'style'"),
    ],
)
def test_options_that_are_none_are_named(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(["inspect", UNET, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_kind_chooses_other_sites(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "smp:fpn?encoder_name=resnet18", "--kind", "logits", "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert {site["kind"] for site in sites if site["swap"]} == {"logits"}
    assert {site["kind"] for site in sites if not site["swap"]} >= {"feature"}


def test_a_spec_is_named_after_its_architecture(folder: Path) -> None:
    assert run(["convert", UNET]) == 0
    assert [path.name for path in folder.iterdir()] == ["unet.upswap.pt"]


def test_safetensors(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "unet.pt", "-o", "unet.safetensors"]) == 0
    assert 'model = upswap.load("unet.safetensors")\n' in capsys.readouterr().out
    assert verify(torch.load(unet, weights_only=False), upswap.load("unet.safetensors")).ok


def test_safetensors_of_a_model_that_no_spec_builds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(smp.Unet("resnet18", encoder_weights=None, activation=nn.Sigmoid), "unet.pt")
    assert run(["convert", "unet.pt", "-o", "unet.safetensors"]) == 0
    assert 'model = upswap.load("unet.safetensors", Unet(...))\n' in capsys.readouterr().out


def test_a_dry_run_writes_nothing(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "unet.pt", "--dry-run"]) == 0
    assert "nothing (dry run)" in capsys.readouterr().out
    assert list(unet.parent.iterdir()) == [unet]


def test_weights(unet: Path) -> None:
    model = torch.load(unet, weights_only=False)
    torch.save(model.state_dict(), "weights.pt")
    assert run(["convert", UNET, "--weights", "weights.pt", "-o", "x.pt"]) == 0
    assert verify(model, upswap.load("x.pt")).ok


def test_a_patched_file_is_said_to_be_patched(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "unet.pt"]) == 0
    capsys.readouterr()
    assert run(["convert", "unet.upswap.pt", "-o", "again.pt"]) == 0
    out, err = capsys.readouterr()
    assert "note: this Unet is patched already (5 upsamplers)" in err
    assert "parameters added   0 " in out


def test_what_is_not_equal_is_not_saved(
    unet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    apply = operation.apply

    def broken(model: nn.Module, *arguments: Any) -> None:
        apply(model, *arguments)
        with torch.no_grad():
            model.segmentation_head[0].weight *= 1.001

    monkeypatch.setattr(operation, "apply", broken)
    assert run(["convert", "unet.pt"]) == 1
    err = capsys.readouterr().err
    assert "does not compute what the original did, nothing was saved" in err
    assert "relative difference 1.0e-03" in err
    assert list(unet.parent.iterdir()) == [unet]


def test_the_papers_initialisation_may_differ(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", UNET, "--init", "paper"]) == 0
    assert "dysample with these options is not exact at step 0" in capsys.readouterr().out


# ---- tables


@pytest.mark.parametrize("width", [60, 80, 100, 120, 150, 200])
@pytest.mark.parametrize("source", ["smp:upernet?encoder_name=resnet18", "smp:unetplusplus?encoder_name=resnet18"])
def test_the_table_fits_and_loses_nothing(
    source: str, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(["inspect", source]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= width
    assert "…" not in out
    assert run(["inspect", source, "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    text = re.sub(r"\s+", "", out)
    assert len(sites) >= 11
    for site in sites:
        words = [
            site["kind"],
            site["mode"],
            "swap" if site["swap"] else "keep",
            *([site["route"]] if site["route"] else []),
        ]
        assert all(word in text for word in words)
        if width >= 80:
            assert site["name"] in out  # narrower, long names fold


def test_the_table_shows_each_site_on_its_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "smp:upernet?encoder_name=resnet18", "--exclude", "decoder:0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "UPerNet: 5 to swap, 7 to keep (4 context, 1 feature, 1 identity, 1 logits)"
    at = next(i for i, line in enumerate(lines) if line.split()[1:2] == ["decoder:0"])
    assert lines[at].split() == ["keep", "decoder:0", "feature", "bilinear", "x8", "256"]
    assert lines[at + 1].strip() == "2x2 -> 16x16, decoder.py:203: excluded by 'decoder:0'"
    at = next(i for i, line in enumerate(lines) if line.split()[1:2] == ["decoder:1"])
    assert lines[at].split()[0] == "swap"
    assert lines[-1] == "ac: align_corners=True"


# ---- JSON


def test_inspect_json_is_the_plan(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "unet.pt", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    plan = upswap.Plan.from_json(out)
    assert [site.name for site in plan.swapped] == SITES
    # The plan of the dry run is the one that is carried out.
    model = upswap.patch(torch.load(unet, weights_only=False), plan=plan)
    assert len(upswap.upsamplers(model)) == 5


def test_convert_json(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "unet.pt", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result = json.loads(out)
    assert result["saved"] == "unet.upswap.pt"
    assert result["load"] == 'model = upswap.load("unet.upswap.pt")'
    assert result["max_rel_diff"] <= 1e-5
    assert result["parameters_added"] == sum(p.numel() for p in upswap.parameters(upswap.load("unet.upswap.pt")))
    assert len(result["verified_at"]) == 2
    assert len(upswap.Plan.from_dict(result["plan"]).swapped) == 5


@pytest.mark.parametrize(
    ("arguments", "code", "kind"),
    [
        (["inspect", "missing.pt"], 1, "SourceError"),
        (["inspect", UNET, "--exclude", "nothing"], 2, "FilterError"),
        (["inspect", UNET, "--style", "xx"], 2, "BadParameter"),
        (["convert", "smp:linknet?encoder_name=resnet18"], 3, "NothingToSwapError"),
    ],
)
def test_errors_are_json_too(
    arguments: list[str], code: int, kind: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--json"]) == code
    out, _ = capsys.readouterr()
    error = json.loads(out)
    assert error["type"] == kind
    assert error["error"]


# ---- errors


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["inspect", "missing.pt"], 1, "there is no file missing.pt"),
        (["inspect", "smp:unit"], 1, "near it: unet"),
        (["inspect", "."], 1, "is a folder"),
        (["inspect", UNET, "--include", "decoder.block.0"], 2, "decoder.blocks.0"),
        (["inspect", UNET, "--kind", "features"], 2, "'features' is not one of"),
        (["inspect", UNET, "--input-size", "0"], 2, "is not a size in pixels"),
        (["inspect", UNET, "--input-size", "4x"], 2, "is not a size in pixels"),
        (["inspect"], 2, "Missing argument"),
        (["convert", UNET, "--groups", "0"], 2, "'--groups'"),
        (["convert", UNET, "--groups", "3", "--strict"], 2, "3 groups do not divide"),
        (["convert", UNET, "-o", "x.bin"], 1, "must end in"),
        (["convert", UNET, "-o", "no/x.pt"], 1, "cannot be written: there is no folder"),
        (["convert", "smp:linknet?encoder_name=resnet18"], 3, "ConvTranspose2d"),
        (["convert", UNET, "--exclude", "*"], 3, "nothing to swap"),
        (["nothing"], 2, "No such command"),
        ([], 2, "Commands:"),
    ],
)
def test_an_error_is_one_message_and_a_code(
    arguments: list[str], code: int, says: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    out, err = capsys.readouterr()
    assert says in err
    assert "Traceback" not in err + out
    assert list(folder.iterdir()) == []


def test_the_target_is_looked_at_before_the_work(unet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (unet.parent / "unet.upswap.pt").write_bytes(b"mine")
    assert run(["convert", "unet.pt"]) == 1
    assert "--force" in capsys.readouterr().err
    assert (unet.parent / "unet.upswap.pt").read_bytes() == b"mine"
    assert run(["convert", "unet.pt", "--force"]) == 0
    assert len(upswap.upsamplers(upswap.load("unet.upswap.pt"))) == 5
    assert run(["convert", "unet.pt", "-o", "unet.pt", "--force"]) == 1
    assert "source itself" in capsys.readouterr().err


def test_debug_shows_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "missing.pt", "--debug"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "error: there is no file missing.pt" in err


def test_a_bug_is_one_message_too(
    unet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from upswap import api

    def bug(*_: object, **__: object) -> None:
        raise KeyError("gone")

    monkeypatch.setattr(api, "inspect", bug)
    assert run(["inspect", "unet.pt"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'gone'" in err
    assert "--debug" in err
    assert "Traceback" not in err


def test_a_file_with_code_of_its_own_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("touch ran",)

    torch.save(Evil(), "evil.pt")
    assert run(["inspect", "evil.pt"]) == 1
    assert "posix.system" in capsys.readouterr().err
    assert not (folder / "ran").exists()


def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    """`upswap inspect ... | head -1`"""
    command = f"{sys.executable} -m upswap inspect '{UNET}' --json | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stderr == ""


def test_the_script_exits_with_the_code(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "upswap", "inspect", "missing.pt"], capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stdout == b""
