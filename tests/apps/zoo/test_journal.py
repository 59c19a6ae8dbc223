"""A journal is read without being changed, goes on after a kill or an editor, and owns the files that a run may replace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import upswap
from upswap import OptionError, SaveError, SourceError
from upswap.apps.cli import run
from upswap.apps.zoo import catalog
from upswap.apps.zoo.journal import Journal
from upswap.apps.zoo.rows import Row, Settings
from zoo_runs import built, listing, rows

Captured = pytest.CaptureFixture[str]


def started(folder: Path, *sources: str) -> Journal:
    journal = Journal(folder)
    journal.start(Settings({}), lambda claimed: catalog.targets(sources, folder, ".pt", claimed))
    return journal


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name", ["report.csv", pytest.param("report.html", marks=pytest.mark.slow), "one.pt", "journal.jsonl"]
)
def test_links_in_the_folder_of_a_run_are_not_written_through(name: str, place: Path, capsys: Captured) -> None:
    """The folder, and its journal, may be somebody else's."""
    models = listing(place, "make?name=one")
    folder = place / "out"
    assert run(["zoo", "list", models, "-o", "out"]) == 0
    (target,) = folder.glob("*.pt")
    file = target if name == "one.pt" else folder / name
    mine = file.rename(place / "mine")
    before = mine.read_bytes()
    file.symlink_to(mine)
    commands = [["list", models, "-o", "out", *extra] for extra in ([], ["--force"], ["--retry-failed"])]
    commands += [["report", "out"]] if name in ("report.csv", "report.html") else []
    for arguments in commands:
        capsys.readouterr()
        assert run(["zoo", *arguments]) == 1, arguments
        assert f"{file.name} is a symbolic link" in capsys.readouterr().err
        assert mine.read_bytes() == before


# ---- reading


#: Files of that name that are none of upswap's.
FOREIGN = {
    "nothing": b"",
    "text": b"what I did today",
    "lines": b'{"event": "login"}\n{"event": "logout"}\n',
    "half a line": b'{"event": "login"}\n{"event": "log',
    "a list": b"[1, 2]\n",
    "deep": b"[" * 100_000,
    "bytes": bytes(range(256)),
    "settings": b'{"schema": 1, "settings": "mine"}\n',
}


@pytest.mark.parametrize("name", FOREIGN)
def test_somebody_elses_journal_stays_as_it_is(name: str, place: Path, capsys: Captured) -> None:
    folder = place / "out"
    folder.mkdir()
    (folder / "journal.jsonl").write_bytes(FOREIGN[name])
    before = contents(folder)
    models = listing(place, "make?name=one")
    for arguments in (["report", "out"], *(["list", models, "-o", "out", *extra] for extra in ([], ["--force"]))):
        assert run(["zoo", *arguments]) == 1
        said = capsys.readouterr().err
        assert "out/journal.jsonl, line 1: this is no journal of upswap" in said
        assert "bug" not in said
        assert contents(folder) == before
    assert built(place) == []


def test_reading_changes_nothing(tmp_path: Path, capsys: Captured) -> None:
    journal = started(tmp_path, "a.pt", "b.pt")
    journal.append(Row("a.pt", "converted"))
    whole = journal.path.read_bytes()
    line = json.dumps(Row("b.pt", "converted").to_dict()).encode()
    for end in (b"", line[:1], line[:-1], line, b"\n\n" + line + b"\n \n"):
        journal.path.write_bytes(whole + end)
        journal.path.chmod(0o400)
        for reader in (journal, Journal(tmp_path)):
            assert list(reader.rows()) == (["a.pt", "b.pt"] if line in end else ["a.pt"])
            assert reader.targets() == {"a.pt": "a.pt", "b.pt": "b.pt"}
        assert run(["zoo", "report", str(tmp_path)]) == 0
        assert journal.path.read_bytes() == whole + end
        journal.path.chmod(0o600)
    capsys.readouterr()


def test_a_last_line_that_lost_its_end_goes_on(tmp_path: Path) -> None:
    journal = started(tmp_path)
    for name in ("a", "b"):
        journal.append(Row(name, "converted"))
    whole = journal.path.read_bytes()
    journal.path.write_bytes(whole.rstrip(b"\n"))  # as some editors do
    again = Journal(tmp_path)
    assert list(again.rows()) == ["a", "b"]
    assert again.append(Row("c", "converted"))
    assert not again.append(Row("b", "failed"))
    assert list(again.rows()) == list(Journal(tmp_path).rows()) == ["a", "b", "c"]
    assert again.path.read_bytes().startswith(whole)
    again.path.write_bytes(again.path.read_bytes().rstrip(b"\n"))
    again.forget(["a"])
    assert list(Journal(tmp_path).rows()) == list(again.rows()) == ["b", "c"]
    assert list(journal.rows()) == ["b", "c"]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"what is this",
        b"7",
        b'{"status": "converted"}',
        b'{"source": 3}',
        b'{"source": "x", "sites": "many"}',
        b'{"source": "x", "kept": {"logits": []}}',
        b'{"source": "x", "details": [1]}',
        b'{"source": "x", "output": "../other.pt"}',
        b'{"targets": {"x": "/etc/passwd"}}',
        b'{"targets": {"x": "journal.jsonl"}}',
        b'{"targets": ["x"]}',
    ],
)
def test_a_bad_line_is_named(line: bytes, tmp_path: Path, capsys: Captured) -> None:
    journal = started(tmp_path)
    journal.append(Row("a", "converted"))
    whole = journal.path.read_bytes()
    bad = whole + line + b"\n" + whole.splitlines()[1] + b"\n"
    journal.path.write_bytes(bad)
    (tmp_path / "models.txt").write_text("a.pt\n")
    for reader in (journal, journal, Journal(tmp_path)):
        for use in (reader.rows, lambda: reader.append(Row("b")), lambda: reader.forget(["a"])):  # noqa: B023
            with pytest.raises(SourceError, match=r"journal\.jsonl, line 3: this is no row of a journal \("):
                use()
    for arguments in (["report", str(tmp_path)], ["list", str(tmp_path / "models.txt"), "-o", str(tmp_path)]):
        assert run(["zoo", *arguments]) == 1
        said = capsys.readouterr().err
        assert "line 3: this is no row" in said
        assert "bug" not in said
    assert journal.path.read_bytes() == bad


def test_what_the_system_refuses_is_told(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "models.txt").write_text("a.pt\n")
    (tmp_path / "folder" / "journal.jsonl").mkdir(parents=True)
    for folder, code in (("models.txt", 1), ("folder", 1), ("x" * 300, 1)):
        assert run(["zoo", "list", str(tmp_path / "models.txt"), "-o", str(tmp_path / folder)]) == code
        said = capsys.readouterr().err
        assert "cannot be written: " in said
        assert "bug" not in said


def test_a_worker_that_waited_while_rows_were_taken_out_loses_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`forget` writes the file anew: who waits for the lock has the old one open."""
    from upswap.apps.zoo import journal as module

    journal = started(tmp_path)
    journal.append(Row("a", "failed"))
    lock, waited = module._lock, []

    def late(file: object) -> None:
        if not waited:
            waited.append(file)
            Journal(tmp_path).forget(["a"])
        lock(file)

    monkeypatch.setattr(module, "_lock", late)
    assert journal.append(Row("b", "converted"))
    assert list(Journal(tmp_path).rows()) == ["b"]


# ---- files that are the user's own


def mine(place: Path, name: str) -> Callable[[], None]:
    path = place / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")

    def stays() -> None:
        assert path.read_text() == "mine"

    return stays


@pytest.mark.parametrize(
    "name", ["python-nets_of_zoo_make-name=one.pt", "report.csv", pytest.param("report.html", marks=pytest.mark.slow)]
)
def test_a_users_file_is_replaced_only_by_force(name: str, place: Path, capsys: Captured) -> None:
    stays = mine(place, name)
    models = listing(place, "make?name=two", "make?name=one")
    assert run(["zoo", "list", models, "-o", "out"]) == 1
    said = capsys.readouterr().err
    assert f"out/{name}: there already" in said
    assert "--force" in said
    stays()
    assert built(place) == []
    assert list(contents(place / "out")) == [name]
    assert run(["zoo", "list", models, "-o", "out", "--force"]) == 0
    assert (place / "out" / name).read_bytes() != b"mine"
    assert run(["zoo", "list", models, "-o", "out"]) == 0  # they are the run's now
    assert run(["zoo", "report", "out"]) == 0


def test_a_users_file_in_the_folder_of_a_run(place: Path, capsys: Captured) -> None:
    assert run(["zoo", "list", listing(place, "make?name=one"), "-o", "out"]) == 0
    before = (place / "out" / "journal.jsonl").read_bytes()
    stays = mine(place, "python-nets_of_zoo_make-name=two.pt")
    models = listing(place, "make?name=one", "make?name=two", "make?name=three")
    assert run(["zoo", "list", models, "-o", "out"]) == 1
    assert "make-name=two.pt: there already" in capsys.readouterr().err
    stays()
    assert (place / "out" / "journal.jsonl").read_bytes() == before


def test_a_later_source_of_the_list_is_not_written_over(place: Path, capsys: Captured) -> None:
    import nets_of_zoo

    for folder in ("in", "out"):
        (place / folder).mkdir()
        upswap.save(nets_of_zoo.Net(), place / folder / "unet.safetensors")
    before = contents(place / "out")
    (place / "models.txt").write_text("in/unet.safetensors\nout/unet.safetensors\n")
    for extra in ([], ["--force"], ["--dry-run"]):
        assert run(["zoo", "list", "models.txt", "-o", "out", "--format", "safetensors", *extra]) == 1
        assert "out/unet.safetensors, the file for in/unet.safetensors, is a source" in capsys.readouterr().err
        assert contents(place / "out") == before


@pytest.mark.slow
def test_models_of_like_names_are_all_there(place: Path) -> None:
    """In one list, and in lists of two runs in one folder; a run that goes on finds its own."""
    from torch import nn

    for index, name in enumerate(("a/unet.pt", "b/unet.pt", "c/unet-2.pt", "d/unet.pt")):
        (place / name).parent.mkdir()
        width = 4 + 4 * index
        model = nn.Sequential(nn.Conv2d(3, width, 1), nn.Upsample(scale_factor=2), nn.Conv2d(width, 2, 1))
        upswap.save(model, place / name)
    (place / "models.txt").write_text("a/unet.pt\nb/unet.pt\nc/unet-2.pt\n")
    (place / "more.txt").write_text("d/unet.pt\na/unet.pt\n")
    for models in ("models.txt", "more.txt", "models.txt"):
        assert run(["zoo", "list", models, "-o", "out"]) == 0
    found = rows(place / "out")
    assert len(found) == len({row.output for row in found.values()}) == 4
    for source, row in found.items():
        assert upswap.load(place / "out" / row.output)[0].weight.shape == upswap.load(place / source)[0].weight.shape
    # As where a run was killed between a file and its row.
    journal = Journal(place / "out")
    kept = [line for line in journal.path.read_text().splitlines() if '"source": "b/unet.pt"' not in line]
    journal.path.write_text("\n".join(kept) + "\n")
    assert run(["zoo", "list", "models.txt", "-o", "out"]) == 0
    assert Journal(place / "out").rows()["b/unet.pt"].output == found["b/unet.pt"].output


def test_other_settings_claim_nothing(tmp_path: Path) -> None:
    journal = started(tmp_path, "a.pt")
    before = journal.path.read_bytes()
    with pytest.raises(OptionError, match="other settings"):
        Journal(tmp_path).start(Settings({"style": "pl"}), lambda _: {"b.pt": tmp_path / "b.pt"})
    (tmp_path / "b.pt").touch()
    with pytest.raises(SaveError, match=r"b\.pt: there already"):
        Journal(tmp_path).start(Settings({}), lambda _: {"b.pt": tmp_path / "b.pt"})
    assert journal.path.read_bytes() == before
