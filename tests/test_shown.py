"""Whatever text is in a file, a plan or a row: what is shown of it does nothing to a terminal, a spreadsheet or a browser."""

from __future__ import annotations

import ast
import copy
import csv
import io
import json
import pickle
import re
import subprocess
import sys
import traceback
import types
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.markup import render
from torch import nn

import upswap
from upswap import api
from upswap.apps.cli import inspect_, output, run
from upswap.apps.zoo.journal import Journal
from upswap.apps.zoo.page import to_html
from upswap.apps.zoo.report import to_csv
from upswap.apps.zoo.rows import Row, Settings
from upswap.errors import PlanError, UpswapError, UpswapWarning
from upswap.plan.plan import Plan
from upswap.shown import csv_text, errors_shown, one_line, shown, tag

ROOT = Path(__file__).parents[1]

#: Colours, a title, a link and the clipboard by escape sequences, their one-character forms, a line written over, text turned
#: round, rich's markup that opens, closes nothing and links, a forged line, an element, a formula.
HOSTILE = (
    "=cmd|' /C calc'!A0\x1b[31m\x1b]0;t\x07\x1b]8;;http://x\x1b\\\x1b]52;c;eA==\x07\x9b1m\x7f\x00\rover\u202e\u2066\u2028"
    "[red][/][link=http://x]:warning:<script>x</script>\"'&\nerror:forged\ud800"
)
#: Each of these alone begins a cell that a spreadsheet computes.
FORMULAS = ("=1+1", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", " =1", "\n=1", "＝1")  # noqa: RUF001


def assert_clean(text: str) -> None:
    text.encode()  # no half of a character
    odd = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs") and c not in "\n\t"}
    assert not odd, f"{odd} in {text!r}"


def assert_no_forged_line(text: str) -> None:
    assert not [line for line in text.splitlines() if line.lstrip().startswith("error:forged")], text


class Elements(HTMLParser):
    """The elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: Counter[tuple[str, ...]] = Counter()
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found[(name, *(key for key, _ in attributes))] += 1


def leaves(data: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to the strings in plain data, to its keys too (they end with None)."""
    if isinstance(data, str):
        yield way
    elif isinstance(data, dict):
        for key, value in data.items():
            yield (*way, key, None)
            yield from leaves(value, (*way, key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from leaves(value, (*way, index))


def spoiled(data: Any, way: tuple[Any, ...], text: str = HOSTILE) -> Any:
    """A copy of plain data with `text` at the end of a way."""
    data = json.loads(json.dumps(data))
    of_key = way[-1] is None
    *above, last = way[:-1] if of_key else way
    holder = data
    for step in above:
        holder = holder[step]
    holder[text if of_key else last] = holder.pop(last) if of_key else text
    return data


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.conv(x), scale_factor=2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.up, self.head = (
            nn.Conv2d(3, 8, 1),
            Block(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.head(self.up(self.block(self.stem(x)))), size=x.shape[2:])


@pytest.fixture(scope="module")
def plan() -> dict[str, Any]:
    made = upswap.inspect(Net(), torch.randn(1, 3, 16, 16), overrides={"block": {"groups": 2}})
    data = made.to_dict() | {"hints": ["a hint"], "inputs": made.inputs or {"key": "value"}}
    data["sites"][0]["notes"] = ["a note"]
    found: dict[str, Any] = json.loads(json.dumps(data))
    return found


def told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


# -- plans ----------------------------------------------------------------------------------------------------------------


def test_every_string_of_a_plan(plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    ways = list(leaves(plan))
    assert len(ways) > 100
    monkeypatch.setattr(inspect_, "open_model", lambda options: (types.SimpleNamespace(model=nn.Identity()), None))
    model = nn.Identity()
    report = upswap.verify(nn.Conv2d(3, 1, 1), copy.deepcopy(model), torch.randn(1, 3, 4, 4))
    shown_some = 0
    for way in ways:
        try:
            found = Plan.from_dict(spoiled(plan, way))
        except PlanError as error:
            assert_clean(told(error))
            assert_no_forged_line(str(error))
            continue
        shown_some += 1
        conversion = upswap.Conversion(model, found, report, Path(HOSTILE), 0)
        monkeypatch.setenv("COLUMNS", "2000")  # so that no long line is folded where the next would seem to begin
        for text in (str(found), repr(found), repr(found.sites), str(conversion), repr(conversion)):
            assert_clean(text)
            assert_no_forged_line(text)
        with pytest.raises(PlanError) as missing:
            found.site(f"{HOSTILE}x")
        assert_clean(told(missing.value))
        for page in (found._repr_html_(), conversion._repr_html_()):
            assert_clean(page)
            assert {name for name, *_ in Elements(page).found} <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
        monkeypatch.setattr(api, "inspect", lambda *_, found=found, **__: found)
        monkeypatch.setattr(
            api, "convert", lambda *_, found=found, **__: upswap.Conversion(model, found, report, None, 0)
        )
        for width in ("80", "2000"):
            monkeypatch.setenv("COLUMNS", width)
            for command in (["inspect", "x"], ["inspect", "x", "--json"], ["convert", "x"]):
                assert run(command) in (0, 2), "2: there is no such upsampler"
                out, err = capsys.readouterr()
                assert_clean(out + err)
                if width == "2000":
                    assert_no_forged_line(out + err)
    assert shown_some > 20


def test_markup_in_a_name_is_shown_as_it_is_written(plan: dict[str, Any]) -> None:
    name = "[red]a[/] [link=x]:warning:"
    with pytest.raises(Exception, match="closing tag"):
        render("[/]")
    assert name in str(Plan.from_dict(spoiled(plan, ("sites", 0, "reason"), name)))


def test_a_line_to_paste_names_no_class_that_is_no_name(tmp_path: Path) -> None:
    model = upswap.patch(Net(), torch.randn(1, 3, 16, 16))
    load_line = sys.modules["upswap.apps.cli.convert"]._load_line  # the package has the command by that name
    path = tmp_path / 'it\'s "odd".safetensors'
    upswap.save(model, path)
    evil = Plan.from_dict(spoiled(upswap.plan_of(model).to_dict(), ("model_class",), "a.__import__('os').abort"))
    line = load_line(path, ("a",), evil)
    call = ast.parse(line).body[0].value  # type: ignore[attr-defined]
    assert ast.literal_eval(call.args[0]) == str(path)
    evil = Plan.from_dict(spoiled(upswap.plan_of(model).to_dict(), ("model_class",), "a.X(__import__('os'))"))
    assert "__import__" not in load_line(path, (), evil)


# -- files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "net.safetensors"
    upswap.save(upswap.patch(Net(), torch.randn(1, 3, 16, 16)), path)
    return path


def header_of(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["upswap"])  # noqa: SIM118


def write(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"upswap": json.dumps(header)})


def test_every_string_of_a_files_description(saved: Path, tmp_path: Path, capsys: Any) -> None:
    tensors, header = header_of(saved)
    shallow = [way for way in leaves(header) if len(way) <= 4]
    assert len(shallow) > 30
    path = tmp_path / "odd.safetensors"
    texts = [(way, text) for way in shallow for text in (HOSTILE,)]
    texts += [(("source",), f"smp:unet?encoder_name={HOSTILE}"), (("source",), f"smp:unet?activation={HOSTILE}")]
    texts += [(("source",), f"python:{HOSTILE}:x"), (("source",), f"timm:{HOSTILE}"), (("shared", "a"), HOSTILE)]
    for way, text in texts:
        write(path, tensors, spoiled(header, way, text.replace("&", "")))
        for model in (None, Net()):
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                try:
                    upswap.load(path, model)
                except UpswapError as error:
                    assert_clean(told(error))
                    assert_no_forged_line(str(error))
            for warning in said:
                assert_clean(warnings.formatwarning(warning.message, warning.category, "f", 1))
    for debug in ([], ["--debug"], ["--json"]):
        assert run(["inspect", str(path), *debug]) == 1
        out, err = capsys.readouterr()
        assert_clean(out + err)


def test_names_in_a_pickle_and_of_a_file(tmp_path: Path, capsys: Any) -> None:
    for name, held in (("a\x1b[31m[red].pt", {HOSTILE[:-1]: 1}), ("b.pt", {HOSTILE[:-1]: torch.zeros(1)})):
        torch.save(held, tmp_path / name)
        for more in ([], ["--weights", HOSTILE.replace("\0", "")]):
            assert run(["inspect", str(tmp_path / name), *more]) == 1
            out, err = capsys.readouterr()
            assert_clean(out + err)
    for command in (
        ["inspect"],
        ["inspect", "--style", HOSTILE],
        [HOSTILE],
        ["zoo", "list", HOSTILE.replace("\0", "")],
    ):
        assert run(command) in (1, 2)
        out, err = capsys.readouterr()
        assert_clean(out + err)


def test_an_error_that_nobody_catches(saved: Path, tmp_path: Path) -> None:
    tensors, header = header_of(saved)
    path = tmp_path / "odd.safetensors"
    write(path, tensors, {**header, "source": "smp:unet?activation=\x1b[31m\x9b", "plan": None})
    code = f"import upswap; upswap.load({str(path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    assert b"\\x1b[31m" in done.stderr
    assert_clean(done.stderr.decode())


def test_errors_behind_an_error_are_clean_too() -> None:
    @errors_shown()
    def fail() -> None:
        try:
            raise ValueError("\x1b[1m", 3)
        except ValueError as error:
            error.__cause__ = RuntimeError("\x9b")
            raise UpswapError("\x1b[2m") from error

    with pytest.raises(UpswapError) as caught:
        fail()
    assert_clean(told(caught.value))
    assert caught.value.__cause__ is not None
    assert caught.value.__cause__.args == ("\\x1b[1m", 3)


def test_errors_and_warnings_are_clean_and_stay_so_when_pickled() -> None:
    for kind in (UpswapError, PlanError, UpswapWarning):
        error = kind(HOSTILE)
        assert_clean(str(error))
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# -- runs over many models ------------------------------------------------------------------------------------------------


def row(**changes: Any) -> Row:
    made = Row(
        "smp:unet",
        status="converted",
        error="an error",
        model="a.B",
        output="x.pt",
        sites=2,
        swapped=1,
        kept={"logits": 1},
        routes={"source": 1},
        parameters=10,
        parameters_after=12,
        flops_at="1x3x64x64",
        max_rel_diff=-0.5,
        checks={"step 0": "differs"},
        seconds={"build": 1.0},
        versions={"torch": "2"},
        worker="host:1",
        details=[
            {
                "site": "a",
                "kind": "feature",
                "mode": "nearest",
                "ratio": "x2",
                "channels": 1,
                "shape": "1",
                "swap": True,
                "route": "graph",
                "reason": "r",
            }
        ],
    )
    return Row.from_dict(made.to_dict() | changes)


def test_every_string_of_a_row(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = row().to_dict()
    expected = Elements(to_html([row()], "t", {})).found
    fixed = {(key, None) for key in plain} | {
        (*way,) for way in leaves(plain) if way[0] == "details" and way[-1] is None
    }
    for way in leaves(plain):
        if way in fixed:
            continue
        for text in (HOSTILE, *FORMULAS):
            found = Row.from_dict(spoiled(plain, way, text))
            page = to_html([found], "t", {})
            assert_clean(page)
            assert Elements(page).found == expected, way
            check_csv(to_csv([found]))
        folder = tmp_path / re.sub(r"\W", "", "_".join(map(str, way)))
        journal = Journal(folder)
        journal.start(Settings({"upsampler": HOSTILE}), lambda _: {})
        journal.append(Row.from_dict(spoiled(plain, way)))
        monkeypatch.setenv("COLUMNS", "2000")
        for command in (["zoo", "report", str(folder)], ["zoo", "report", str(folder), "--json"]):
            assert run(command) == (way == ("output",))  # HOSTILE is no name of a file in the folder: an error names it
            out, err = capsys.readouterr()
            assert_clean(out + err)
            assert_no_forged_line(out + err)


def check_csv(text: str) -> None:
    assert_clean(text)
    for cells in csv.reader(io.StringIO(text)):
        for cell in cells:
            if cell.lstrip().startswith(tuple("=+-@\t\r＝＋－＠")):  # noqa: RUF001
                float(cell)


def test_numbers_stay_numbers() -> None:
    head, cells = csv.reader(io.StringIO(to_csv([row()])))
    assert float(dict(zip(head, cells, strict=True))["max_rel_diff"]) == -0.5


def test_columns_of_the_page_that_should_be_numbers() -> None:
    found = row()
    found.details[0]["channels"] = "<img src=x>"
    page = to_html([found], "<b>", {"started": "<i>", "settings": {"<u>": "<s>"}})
    assert {"i", "u", "s", "img"}.isdisjoint(name for name, *_ in Elements(page).found)


def test_a_list_of_models(tmp_path: Path, capsys: Any) -> None:
    listed = tmp_path / "models.txt"
    listed.write_text("[/]\x1b[31m.pt\n[red]\x9b.pt\nsmp:unet?activation=\x1b[/]\nsmp:\x07[/]\n", encoding="utf-8")
    for more in ([], ["--json"]):
        run(["zoo", "list", str(listed), "--dry-run", *more])
        out, err = capsys.readouterr()
        assert_clean(out + err)
        assert "[/]" in out


def test_progress_of_hostile_names(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from upswap.console import console

    drawn = io.StringIO()
    terminal = console(file=drawn, force_terminal=True, width=80)
    monkeypatch.setattr(output, "stderr", lambda: terminal)
    with output.progress("[/]\x1b]0;t\x07"):
        pass
    own = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", drawn.getvalue())  # of rich's own
    assert "[/]" in own
    assert_clean(own.replace("\r", ""))


# -- the functions, and that there is no way around them ------------------------------------------------------------------


def test_text_for_a_terminal() -> None:
    assert shown("plain ä 漢 [x]\n\ttab") == "plain ä 漢 [x]\n\ttab"
    assert shown(shown(HOSTILE)) == shown(HOSTILE)
    assert one_line("a" * 400, 300) == "a" * 300 + "..."
    assert "\n" not in one_line(HOSTILE)


@pytest.mark.parametrize("text", FORMULAS)
def test_cells(text: str) -> None:
    (cells,) = csv.reader(io.StringIO(csv_text([[text, -1, 0.5, None, "a-b"]])))
    assert cells[0].startswith(("'", "\\"))
    assert cells[1:] == ["-1", "0.5", "", "a-b"]


def test_elements() -> None:
    assert tag("a", "<", tag("b"), href='"') == '<a href="&quot;">&lt;<b></b></a>'


#: What reaches a terminal, a spreadsheet or a page, and the files that may call it.
WAYS: dict[str, Callable[[str], bool]] = {
    r"click\.s?echo|\.show\(\)|\bprint_exception\b|sys\.std(out|err)\.write": lambda file: file == "apps/cli/output.py",
    r"\bConsole\(|\bText\(|\bText\.|from_markup": lambda file: file == "console.py",
    r"\bimport csv\b|csv\.writer": lambda file: file == "shown.py",
    r"\bimport html\b|html\.escape|import escape|</\w+>": lambda file: file in ("shown.py", "apps/zoo/page.py"),
}


@pytest.mark.parametrize("pattern", WAYS)
def test_nothing_goes_around(pattern: str) -> None:
    package = ROOT / "upswap"
    found = {
        f"{file}:{number}: {line.strip()}"
        for path in package.rglob("*.py")
        for file in [path.relative_to(package).as_posix()]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if re.search(pattern, line) and not WAYS[pattern](file)
    }
    assert found == set()
