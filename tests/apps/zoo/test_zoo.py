"""Many models in one go: what is chosen, what becomes of each, what a stopped run leaves and how it goes on."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import html.parser
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

import upswap
from upswap import FilterError, OptionError, SourceError
from upswap.apps.cli import run
from upswap.apps.zoo import catalog
from upswap.apps.zoo.checks import run_checks
from upswap.apps.zoo.journal import Journal
from upswap.apps.zoo.rows import Row, Settings
from zoo_runs import built, descendants, listing, rows, start, until

Captured = pytest.CaptureFixture[str]


# ---- what is chosen


def test_patterns_choose_from_the_libraries_own_lists() -> None:
    assert catalog.smp("unet,f*", "resnet18,mit_b[01]", {"classes": 3}) == [
        f"smp:{arch}?encoder_name={encoder}&classes=3"
        for arch in ("unet", "fpn")
        for encoder in ("resnet18", "mit_b0", "mit_b1")
    ]
    assert catalog.smp("unet", "tu-convnext_att*", {})[0] == "smp:unet?encoder_name=tu-convnext_atto"
    assert "timm:hrnet_w18" in catalog.timm("hrnet*", {})
    assert not [spec for spec in catalog.timm("*", {}) if spec.startswith("timm:resnet18")]  # nothing resizes in it
    found = catalog.torchvision("*", {})
    assert {"torchvision:fcn_resnet50", "torchvision:maskrcnn_resnet50_fpn", "torchvision:raft_small"} <= set(found)
    assert "torchvision:resnet18" not in found
    for choose in (lambda: catalog.smp("unit", "*", {}), lambda: catalog.timm("hrnet_w18,nosuch*", {})):
        with pytest.raises(FilterError, match="matches no"):
            choose()


def test_a_list_has_a_source_a_line(tmp_path: Path) -> None:
    path = tmp_path / "models.txt"
    path.write_text("a.pt\n\n  # note\nsmp:unet\n a.pt \n")
    assert catalog.listed(path) == ["a.pt", "smp:unet"]
    path.write_text("# nothing\n")
    with pytest.raises(SourceError, match="lists no sources"):
        catalog.listed(path)
    with pytest.raises(SourceError, match="cannot be read"):
        catalog.listed(tmp_path / "missing.txt")


def test_every_source_has_a_file_of_its_own() -> None:
    sources = [*catalog.smp("*", "resnet18,resnet34", {}), "a/unet.pt", "b/unet.pt", "timm:hrnet_w18", "x/../y.pt"]
    targets = catalog.targets(sources, Path("out"), ".pt")
    assert len(set(targets.values())) == len(sources)
    assert all(target.parent == Path("out") for target in targets.values())


# ---- what becomes of each


def test_a_model_that_goes_wrong_costs_itself_alone(place: Path, capsys: Captured) -> None:
    path = listing(place, "make?name=first", "hangs", "eats", "crashes", "raises", "plain", "nowhere", "make?name=last")
    assert run(["zoo", "list", path, "-o", "out", "--timeout", "20", "--memory", "1"]) == 1
    found = rows(place / "out")
    assert {name: row.status for name, row in found.items()} == {
        "make?name=first": "converted",
        "hangs": "failed",
        "eats": "failed",
        "crashes": "failed",
        "raises": "cannot be built",
        "plain": "nothing to swap",
        "nowhere": "cannot be built",
        "make?name=last": "converted",
    }
    assert found["hangs"].error == "took longer than 20 s (--timeout)"
    assert found["eats"].error == "needs more than 1 GiB of memory (--memory)"
    assert found["crashes"].error == "its process was killed by SIGABRT; the last it said: about to crash"
    assert "ValueError: no such width" in found["raises"].error
    out = capsys.readouterr().out
    assert "8 models: 2 converted, 1 nothing to swap, 2 cannot be built, 3 failed" in out
    assert sorted(p.name for p in (place / "out").glob("*.pt")) == [
        "python-nets_of_zoo_make-name=first.pt",
        "python-nets_of_zoo_make-name=last.pt",
    ]


def test_what_a_row_says_is_so(place: Path) -> None:
    assert run(["zoo", "smp", "--encoder", "resnet18", "--arch", "fpn", "--set", "classes=3", "-o", "out"]) == 0
    ((source, row),) = Journal(place / "out").rows().items()
    assert source == "smp:fpn?encoder_name=resnet18&classes=3"
    model = upswap.load(place / "out" / str(row.output))
    plan = upswap.plan_of(model)
    assert (row.sites, row.swapped) == (len(plan.sites), len(plan.swapped))
    assert row.kept == {"logits": 1}
    assert row.routes == {"source": 9}
    assert row.parameters_after == sum(p.numel() for p in model.parameters())
    assert row.parameters == row.parameters_after - sum(p.numel() for p in upswap.parameters(model))
    assert 0 <= row.max_rel_diff <= 1e-5
    assert row.flops_after > row.flops > 10**8
    assert row.flops_at == "1x3x64x64"
    assert set(row.seconds) == {"build", "look", "verify", "save"}
    assert row.peak_memory > 10**8
    assert row.versions["torch"] == torch.__version__
    assert [site["site"] for site in row.details] == [site.name for site in plan.sites]
    assert model.segmentation_head[0].out_channels == 3


@pytest.mark.parametrize("form", [pytest.param("safetensors", marks=pytest.mark.slow), "plan"])
def test_the_other_forms(form: str, place: Path) -> None:
    assert run(["zoo", "smp", "--encoder", "resnet18", "--arch", "unet", "--format", form, "-o", "out"]) == 0
    suffix = ".plan.json" if form == "plan" else ".safetensors"
    path = place / "out" / f"smp-unet-resnet18{suffix}"
    if form == "plan":
        plan = upswap.Plan.from_json(path.read_text())
        assert len(plan.swapped) == 5
    else:
        assert len(upswap.upsamplers(upswap.load(path))) == 5


def test_checks_write_no_models(place: Path, capsys: Captured) -> None:
    path = listing(place, "make?name=one")
    assert run(["zoo", "list", path, "-o", "out", "--check", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"][0]["checks"] == {"sites": "", "step 0": "", "keys": "", "gradients": "", "unpatch": ""}
    assert told["totals"]["failed_checks"] == 0
    assert sorted(p.name for p in (place / "out").iterdir()) == ["journal.jsonl", "report.csv", "report.html"]


def test_each_check_can_fail(place: Path) -> None:
    import nets_of_zoo

    from upswap.surgery.checking.verification import capture

    def broken(change: Any) -> list[str]:
        model = nets_of_zoo.Net().eval()
        captured = capture(model)
        shapes = {key: value.shape for key, value in model.state_dict().items()}
        upswap.patch(model)
        plan = upswap.plan_of(model)
        plan = change(model, plan) or plan
        return [name for name, message in run_checks(model, plan, captured, shapes).items() if message]

    def moved(model: Any, plan: Any) -> None:
        next(iter(upswap.upsamplers(model).values())).offset.bias.data.add_(0.3)

    def retrained(model: Any, plan: Any) -> None:
        model.stem.weight.data.mul_(2)

    def foreign(model: Any, plan: Any) -> None:
        model.register_buffer("extra", torch.zeros(1))

    def lost(model: Any, plan: Any) -> None:
        model.stem.register_parameter("bias", None)

    def unreachable(model: Any, plan: Any) -> None:
        model.head.weight.data.zero_()

    def moved_plan(model: Any, plan: Any) -> Any:
        (site,) = plan.sites
        return plan.replace_sites([dataclasses.replace(site, owner="nowhere")])

    assert broken(lambda model, plan: None) == []
    assert broken(moved) == ["step 0"]
    assert broken(retrained) == ["step 0", "unpatch"]
    assert broken(foreign) == ["keys"]
    assert broken(lost) == ["step 0", "keys", "unpatch"]
    assert "gradients" in broken(unreachable)
    assert broken(moved_plan) == ["sites"]


def test_dry_run_says_what_it_would_cost(place: Path, capsys: Captured) -> None:
    assert run(["zoo", "smp", "--arch", "unet,dpt", "--encoder", "resnet18", "--dry-run", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert "14,328,209" in out
    assert "out/smp-unet-resnet18.pt" in out
    assert "2 models, 0.1 GB" in out
    assert "1 of them cannot be built" in out
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["smp", "--arch", "unet"], 2, "-o DIR"),
        (["smp", "--arch", "unit", "-o", "out"], 2, "matches no architecture"),
        (["smp", "--set", "classes", "-o", "out"], 2, "KEY=VALUE"),
        (["list", "missing.txt", "-o", "out"], 1, "cannot be read"),
        (["report", "nowhere"], 1, "no run was made there"),
        (["smp", "--arch", "unet", "-o", "out", "--address", "tcp://x"], 2, "--backend"),
        (["smp", "--arch", "unet", "-o", "out", "--style", "xy"], 2, "style"),
    ],
)
def test_an_error_is_one_message(arguments: list[str], code: int, says: str, place: Path, capsys: Captured) -> None:
    assert run(["zoo", *arguments]) == code
    assert says in capsys.readouterr().err


# ---- the journal


def none(_: Any) -> dict[str, Path]:
    """The files of a run that writes none."""
    return {}


def test_a_journal_belongs_to_its_settings(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start(Settings({"style": "lp"}), none)
    journal.start(Settings({"style": "lp"}, timeout=1.0, threads=8), none)  # limits may change
    with pytest.raises(OptionError, match="style was 'lp' and is 'pl'"):
        journal.start(Settings({"style": "pl"}), none)
    (tmp_path / "journal.jsonl").write_text('{"schema": 99, "upswap": "9.0"}\n')
    with pytest.raises(SourceError, match=r"written by 9\.0"):
        Journal(tmp_path).rows()


def test_half_a_line_is_no_row(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.start(Settings({}), none)
    assert journal.append(Row("a", "converted"))
    assert not journal.append(Row("a", "failed"))
    whole = journal.path.read_bytes()
    for cut in (1, 30, len(whole) - 3 - whole.rfind(b"\n", 0, -1)):
        journal.path.write_bytes(whole + whole[whole.rfind(b"\n", 0, -1) + 1 :][:cut].replace(b'"a"', b'"b"')[:cut])
        for reader in (journal, Journal(tmp_path)):
            assert list(reader.rows()) == ["a"]
        assert Journal(tmp_path).append(Row("c"))
        assert list(Journal(tmp_path).rows()) == ["a", "c"]
        journal.forget(["c"])
        assert list(journal.rows()) == list(Journal(tmp_path).rows()) == ["a"]
        assert journal.path.read_bytes() == whole


def _append_many(folder: str, names: list[str]) -> None:
    journal = Journal(Path(folder))
    for name in names:
        journal.append(Row(name, worker=str(os.getpid())))


def test_workers_may_write_at_the_same_time(tmp_path: Path) -> None:
    Journal(tmp_path).start(Settings({}), none)
    names = [f"model {index}" for index in range(60)]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_append_many, args=(str(tmp_path), order)) for order in (names, names[::-1])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["source"] for line in lines[1:]) == sorted(names)
    assert list(Journal(tmp_path).rows()) == [json.loads(line)["source"] for line in lines[1:]]


# ---- a run that is stopped


SLOW = tuple(f"make?name=m{index}&seconds=1.5" for index in range(5))


def test_killed_and_run_again(place: Path) -> None:
    command = ["list", listing(place, *SLOW), "-o", "out", "--jobs", "2"]
    first = start(place, *command)
    until(lambda: len(rows(place / "out")) >= 2)
    others = descendants(first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = list(rows(place / "out"))
    assert 2 <= len(done) < 5
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not [p for p in alive if "upswap.apps.zoo.nursery" in " ".join(p.cmdline())]
    log = built(place)
    again = start(place, *command)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "are in the journal already" in err
    assert "5 models: 5 converted" in out
    assert set(rows(place / "out")) == set(SLOW)
    for name in done:  # what was finished was not built again
        short = name.partition("name=")[2].partition("&")[0]
        assert built(place)[len(log) :].count(short) == 0
    assert all(upswap.load(path, trust=["nets_of_zoo"]) for path in (place / "out").glob("*.pt"))
    assert not list((place / "out").glob(".*"))


@pytest.mark.slow
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(place: Path) -> None:
    command = ["list", listing(place, *SLOW), "-o", "out", "--jobs", "2"]
    process = start(place, *command)
    until(lambda: len(rows(place / "out")) >= 1)
    others = descendants(process)
    for each in (process, *(p for p in others if "nursery" not in " ".join(p.cmdline()))):  # as a terminal does
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            each.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from there" in err
    assert "Traceback" not in err
    assert out == ""
    _, alive = psutil.wait_procs(others, timeout=30)
    assert not [p for p in alive if "nursery" in " ".join(p.cmdline())]
    done = len(rows(place / "out"))
    assert 1 <= done < 5
    again = start(place, *command)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert f"{done} of 5 are in the journal already" in err


def test_failed_ones_again_only_when_asked(place: Path, capsys: Captured) -> None:
    path = listing(place, "make?name=good", "raises")
    assert run(["zoo", "list", path, "-o", "out"]) == 1
    assert run(["zoo", "list", path, "-o", "out"]) == 1
    assert built(place) == ["good"]
    with open(place / "nets_of_zoo.py", "a") as file:
        file.write("\ndef raises():\n    return make('mended')\n")
    assert run(["zoo", "list", path, "-o", "out", "--retry-failed"]) == 0
    assert built(place) == ["good", "mended"]
    assert "2 models: 2 converted" in capsys.readouterr().out


# ---- the report


class _Cells(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_is_one_page_and_a_csv(place: Path, capsys: Captured) -> None:
    path = listing(place, "make?name=one", "raises", "make?name=<b>&seconds=0")
    run(["zoo", "list", path, "-o", "out"])
    for name in ("report.csv", "report.html"):
        (place / "out" / name).unlink()
    capsys.readouterr()
    assert run(["zoo", "report", "out"]) == 0
    assert "3 models: 2 converted, 1 cannot be built" in capsys.readouterr().out
    with open(place / "out" / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["converted", "cannot be built", "converted"]
    assert lines[0]["routes"] in ("source=1", "graph=1")
    page = (place / "out" / "report.html").read_text()
    parser = _Cells()
    parser.feed(page)
    assert parser.outside == []  # nothing is fetched
    assert parser.tags.count("tr") == 1 + 3 + 2 * 2  # heads, models, and a table of sites in two of them
    assert "<b>&amp;" not in page.split("<tbody>")[1]
    assert "no such width" in page
