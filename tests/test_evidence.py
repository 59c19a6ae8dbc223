"""`benchmarks/evidence`: its figures on masks that can be counted by hand, and its judgement on rows that are made up."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "evidence"


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules, found as they are where the folder is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import judging
    import metrics

    import data

    yield {"metrics": metrics, "judging": judging, "data": data}
    for name, module in list(sys.modules.items()):
        if str(FOLDER) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def logits_of(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return 20.0 * F.one_hot(labels, classes).permute(0, 3, 1, 2).float()


def test_a_right_prediction_has_all_points(evidence: Any) -> None:
    labels = torch.zeros(1, 12, 12, dtype=torch.int64)
    labels[:, 3:9, 3:9] = 1
    found = evidence["metrics"].Metrics(3)
    found.add(logits_of(labels, 3), labels)
    result = found.result()
    assert result.pop("cross_entropy") < 1e-6
    assert result == pytest.approx(dict.fromkeys(result, 100.0))


def test_a_square_that_is_one_pixel_off(evidence: Any) -> None:
    labels = torch.zeros(1, 16, 16, dtype=torch.int64)
    labels[:, 4:12, 4:12] = 1
    predicted = labels.roll(1, dims=2)
    labels[:, 15] = 255  # void, which counts nowhere
    found = evidence["metrics"].Metrics(2)
    found.add(logits_of(predicted, 2), labels)
    result = found.result()
    inside, outside = 56 / 72, (240 - 72) / (240 - 56)
    assert result["miou"] == pytest.approx(50 * (inside + outside))
    assert result["accuracy"] == pytest.approx(100 * (240 - 16) / 240)
    # Bands one pixel wide: 28 pixels each, of which the upper and lower side have 7 in common, 6 at both ends none.
    ring = torch.zeros(2, 16, 16, dtype=torch.bool)
    for mask, left in zip(ring, (4, 5), strict=True):
        mask[4:12, left : left + 8] = True
        mask[5:11, left + 1 : left + 7] = False
    of_inside = int((ring[0] & ring[1]).sum()) / int((ring[0] | ring[1]).sum())
    counted = found.bands[1]
    assert float(counted[0, 1] / counted[1, 1]) == pytest.approx(of_inside)
    assert result["boundary_f_1"] > 99.9  # all within one pixel
    assert result["boundary_iou_1"] < result["boundary_iou_2"]


def row(arm: str, seed: int, lr: float, cross_entropy: float, test: float | None = None) -> dict[str, Any]:
    figures = {"miou": 50.0 - cross_entropy, "accuracy": 80.0, "cross_entropy": cross_entropy}
    figures |= {f"boundary_{kind}_{far}": 10.0 for kind in ("iou", "f") for far in (1, 2)}
    common = {
        "data": "shapes",
        "host": "fpn",
        "steps": 10,
        "optimizer": "adamw",
        "side": 96,
        "host_steps": 5,
        "host_lr": 1.0,
    }
    return {
        **common,
        "arm": arm,
        "seed": seed,
        "lr": lr,
        "upsampler_lr_mult": None,
        "val": figures,
        "test": {**figures, "cross_entropy": cross_entropy if test is None else test},
    }


def test_rates_are_chosen_on_the_validation_split(evidence: Any) -> None:
    rows = [row("unpatched", seed, lr, 1.0 + abs(lr - 2) + seed, test=-lr) for seed in (0, 1) for lr in (1.0, 2.0, 3.0)]
    assert [(each["lr"], each["seed"]) for each in evidence["judging"].best(rows)] == [(2.0, 0), (2.0, 1)]


def test_differences_are_paired_and_corrected(evidence: Any) -> None:
    judging = evidence["judging"]
    rows = [row("unpatched", seed, 1.0, 1.0 + seed) for seed in range(5)]
    rows += [
        row("dysample-lp", seed, 1.0, 1.0 + seed - 0.1 - 0.001 * seed) for seed in range(5)
    ]  # between seeds far more
    rows += [row("carafe", seed, 1.0, 1.0 + seed + (-1) ** seed) for seed in range(5)]
    chosen = {arm: judging.best(group) for arm, group in judging._by(rows, "arm").items()}
    found = judging.differences(chosen, "unpatched", "cross_entropy")
    assert found["dysample-lp"].mean == pytest.approx(-0.102)
    assert found["dysample-lp"].half == pytest.approx(
        2.776 * 0.001 * 2.5**0.5 / 5**0.5, rel=1e-3
    )  # Student's t, 4 degrees
    assert found["dysample-lp"].corrected == pytest.approx(2 * found["dysample-lp"].p)
    assert found["carafe"].corrected == found["carafe"].p > 0.5
    text = judging.tables(rows, "unpatched")
    assert "| dysample-lp | 5 | 1 |" in text
    assert "**-0.102** ± 0.002" in text


def test_holm(evidence: Any) -> None:
    corrected = evidence["judging"].holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


def test_a_row_is_measured_once(evidence: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control that is trained for no longer is the host, and arms of a seed begin alike and see the same images."""

    spec = importlib.util.spec_from_file_location("evidence_main", FOLDER / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    main = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(main)
    data = evidence["data"]
    torch.manual_seed(0)
    images, labels = (
        torch.randint(0, most, (3, *rest, 64, 64), dtype=torch.uint8) for most, rest in ((255, (3,)), (3, ()))
    )
    split = data.Split(images, labels)
    made = data.Data("shapes", 3, dict.fromkeys(data.SPLITS, split))
    monkeypatch.setattr(data, "load", lambda *_: made)
    rows = tmp_path / "rows.jsonl"
    command = [
        "run",
        "--data",
        "shapes",
        "--host",
        "segformer",
        "--arm",
        "unpatched",
        "--arm",
        "dysample-lp",
        "--steps",
        "2",
    ]
    command += ["--host-steps", "2", "--side", "64", "--folder", str(tmp_path), "--rows", str(rows), "--lr", "0"]
    for _again in range(2):
        done = CliRunner().invoke(main.evidence, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    control, ours = (json.loads(line) for line in rows.read_text().splitlines())
    assert (control["arm"], ours["arm"]) == ("unpatched", "dysample-lp")
    assert ours["loss"] == pytest.approx(
        control["loss"], rel=1e-5
    )  # at a rate of 0: the same weights, images and order
    assert {moved["mean"] for moved in ours["offsets"]} == {0.0}
    assert CliRunner().invoke(main.evidence, ["table", str(rows)]).output.count("| dysample-lp |") == 1
