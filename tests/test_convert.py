"""`upswap.convert`, the Python twin of the command, and how reports and conversions present themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import upswap
from upswap.apps.cli import run


def sequential() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 3, padding=1)
    ).eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "net.pt"
    torch.save(sequential(), path)
    return path


def test_convert_patches_verifies_and_saves(source: Path) -> None:
    done = upswap.convert(source, style="pl", groups=2)
    assert done.path == source.with_name("net.upswap.pt")
    assert done.report.ok
    assert [site.settings["style"] for site in done.plan.swapped] == ["pl"]
    assert done.parameters_added == sum(p.numel() for p in upswap.parameters(done.model)) > 0
    x = torch.randn(2, 3, 24, 32)
    expected = sequential()(x)
    torch.testing.assert_close(done.model(x), expected)
    torch.testing.assert_close(upswap.load(done.path)(x), expected)


def test_convert_says_what_the_command_says(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = upswap.convert(source, source.with_name("a.pt"))
    assert run(["convert", str(source), "-o", str(source.with_name("b.pt")), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["plan"] == json.loads(done.plan.to_json())
    assert said["parameters_added"] == done.parameters_added
    assert said["max_rel_diff"] == done.report.max_rel_diff
    assert said["verified_at"] == list(dict.fromkeys(row.inputs for row in done.report.rows))


def test_a_dry_run_writes_nothing(source: Path) -> None:
    done = upswap.convert(source, dry_run=True, input_size=(32, 48))
    assert done.path is None
    assert len(upswap.upsamplers(done.model)) == 1
    assert [path.name for path in source.parent.iterdir()] == ["net.pt"]
    assert done.report.rows[0].inputs.endswith("32x48")


def test_what_is_there_is_kept_unless_told_otherwise(source: Path) -> None:
    target = source.with_name("out.pt")
    target.write_bytes(b"mine")
    with pytest.raises(upswap.SaveError):
        upswap.convert(source, target)
    assert target.read_bytes() == b"mine"
    with pytest.raises(upswap.SaveError, match="the source itself"):
        upswap.convert(source, source, force=True)
    assert upswap.convert(source, target, force=True).path == target


def test_the_steps_are_told_in_order(source: Path) -> None:
    steps: list[str] = []

    @contextmanager
    def follow(step: str) -> Iterator[None]:
        steps.append(step)
        yield

    target = source.with_name("out.pt")
    upswap.convert(source, target, progress=follow)
    assert steps == ["looking at the model", "swapping", "verifying", f"saving {target}"]


def test_an_unknown_option_is_named_with_those_near_it(source: Path) -> None:
    with pytest.raises(upswap.OptionError, match=r"no option 'stile'; near it: style"):
        upswap.convert(source, stile="pl")
    assert [path.name for path in source.parent.iterdir()] == ["net.pt"]


def test_inputs_and_their_size_are_not_given_both(source: Path) -> None:
    with pytest.raises(upswap.InputError, match="not both"):
        upswap.convert(source, example_inputs=torch.randn(1, 3, 32, 32), input_size=32)


def test_a_model_with_nothing_to_swap_saves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3)), path)
    with pytest.raises(upswap.NothingToSwapError):
        upswap.convert(path)
    assert [found.name for found in tmp_path.iterdir()] == ["plain.pt"]


def test_a_patched_file_is_given_back_as_it_is(source: Path) -> None:
    first = upswap.convert(source)
    with pytest.warns(upswap.UpswapWarning, match="patched already"):
        again = upswap.convert(first.path, source.with_name("again.pt"))
    assert again.plan == first.plan
    assert again.parameters_added == 0
    assert again.report.max_abs_diff == 0


def test_capture_and_compare_verify_with_one_model() -> None:
    model = sequential()
    before = upswap.capture(model)
    upswap.patch(model)
    assert upswap.compare(before, model).ok
    with torch.no_grad():
        next(upswap.parameters(model)).add_(1.0)
    assert not upswap.compare(before, model).ok


# ---- how they present themselves


def test_a_report_says_each_output(source: Path) -> None:
    done = upswap.convert(source, dry_run=True)
    text = str(done.report)
    assert text.splitlines()[0] == repr(done.report)
    assert len(text.splitlines()) == 1 + len(done.report.rows)
    assert "equal" in text
    assert str(done.plan) in str(done)
    assert "nothing (dry run)" in str(done)
    assert repr(done).startswith("<Conversion: <Plan of Sequential")
    assert "<table>" in done._repr_html_()


def test_a_row_of_a_yaml_model_file_makes_a_dysample() -> None:
    """`[in_channels, scale, style, groups, dyscope]`, as the authors' signature has it."""
    module = upswap.DySample(64, 2, "lp", 4, False)
    assert (module.style, module.groups, module.scope) == ("lp", 4, None)
    assert upswap.DySample(64, 2, "pl", 8, True).scope is not None


def test_the_package_runs_as_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "upswap", "--help"], capture_output=True, text=True, check=True)
    assert "convert" in done.stdout
