"""A target is whole or absent, and a source is never touched, whatever fails and whenever the process dies.

Run as a script (`test_atomic.py HOW FORM FOLDER`) it is the process whose children die: it forks, and a process of pytest
has threads.
"""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import upswap
from upswap import SaveError, SourceError, UpswapWarning
from upswap.files import atomic

FORMS = (".pt", ".safetensors")


def small(value: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 70), nn.Linear(70, 60))
    with torch.no_grad():
        model[0].bias.fill_(value)
    return model


def loaded(path: Path) -> float:
    """The value that `small` was made with, from a file that must be whole."""
    model = upswap.load(path, small() if path.suffix == ".safetensors" else None)
    bias = model[0].bias.detach()
    expected = small(bias[0].item()).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    return float(bias[0])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- killed

NAMES = ("model.safetensors", "config.json", "upswap.json")


def save_together(folder: Path, text: str, force: bool = True) -> None:
    fills = {name: lambda path: path.write_text(text * 1000) and None for name in NAMES}
    atomic.write_together(folder, fills, "upswap.json", force=force)


def check_together_whole(folder: Path, kept: bool) -> None:
    """Once what a kill cut off is finished, files of one save, or none where there were none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UpswapWarning)
        atomic.recover(folder, "upswap.json", NAMES)
    if (folder / "upswap.json").exists():
        assert len({(folder / name).read_text() for name in NAMES}) == 1, names(folder)
    else:
        assert not kept
        assert not set(names(folder)) & set(NAMES)


#: Calls that change nothing on the disk; dying at them is dying at the one before.
READERS = {
    "stat",
    "lstat",
    "fstat",
    "fspath",
    "access",
    "getcwd",
    "scandir",
    "listdir",
    "urandom",
    "readlink",
    "getpid",
}
READERS |= {"_path_normpath", "read", "seek", "tell", "readinto", "readable", "seekable", "fileno"}
_WRITERS = (io.RawIOBase, io.BufferedWriter)


def dies_at(count: int, work: Callable[[], None]) -> bool:
    """Whether a child that does `work` and is killed at call `count` to the system, before or after it, came that far."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
        return os.WIFSIGNALED(status)
    left = count

    def profile(_: types.FrameType, event: str, function: object) -> None:
        nonlocal left
        home = getattr(function, "__self__", None)
        module = getattr(home, "__name__", "") if isinstance(home, types.ModuleType) else ""
        if event.startswith("c_") and (module in ("posix", "fcntl", "io") or isinstance(home, _WRITERS)):
            left -= getattr(function, "__name__", "") not in READERS
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)

    _in_child(work, lambda: sys.setprofile(profile))
    raise AssertionError


def dies_writing(size: int, work: Callable[[], None]) -> bool:
    """Whether a child that does `work` dies of a file growing beyond `size`: in the middle of a write."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
        return os.WIFSIGNALED(status)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    _in_child(work, limit)
    raise AssertionError


def _in_child(work: Callable[[], None], prepare: Callable[[], None]) -> None:
    """Do it and be gone, without anything that the parent would do at its end."""
    code = 1
    try:
        prepare()
        work()
        code = 0
    finally:
        sys.setprofile(None)
        os._exit(code)


def die_many_times(how: str, form: str, folder: Path) -> int:
    """Save in children that die, each a little later, until one does not; the deaths."""
    source, target = folder / f"source{form}", folder / f"model{form}"
    upswap.save(small(1), source)
    before = source.read_bytes()
    sizes = iter(range(1, 10**6, 997))
    for deaths in range(10**6):
        # A fresh target at even numbers, an old one at odd.
        target.unlink(missing_ok=True)
        if deaths % 2:
            upswap.save(small(2), target)

        def work() -> None:
            upswap.save(small(3), target, source=source, force=True)

        died = dies_at(deaths // 2 + 1, work) if how == "calls" else dies_writing(next(sizes), work)
        assert source.read_bytes() == before
        if died:
            assert not target.exists() or loaded(target) in ((2, 3) if deaths % 2 else (3,))
            assert not deaths % 2 or target.exists()
        elif deaths % 2 == 0:
            continue
        else:
            break
    # What the dead left is gone with the next save.
    upswap.save(small(4), target, force=True)
    assert loaded(target) == 4
    assert names(folder) == sorted([source.name, target.name])
    return deaths


def die_together(folder: Path) -> int:
    home = folder / "saved"
    for deaths in range(10**6):
        old = bool(deaths % 2)
        shutil.rmtree(home, ignore_errors=True)
        if old:
            save_together(home, "old")
        died = dies_at(deaths // 2 + 1, lambda: save_together(home, "new"))
        if home.exists():
            check_together_whole(home, old)
        if died:
            save_together(home, "newer")
            assert names(home) == sorted(NAMES)
        elif old:
            break
    return deaths


def run_deaths(how: str, form: str, folder: Path) -> int:
    done = subprocess.run(
        [sys.executable, __file__, how, form, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("form", [pytest.param(".pt", marks=pytest.mark.slow), ".safetensors"])
def test_killed_at_every_call_to_the_system(form: str, tmp_path: Path) -> None:
    assert run_deaths("calls", form, tmp_path) > 60


@pytest.mark.parametrize("form", FORMS)
def test_killed_in_the_middle_of_writing(form: str, tmp_path: Path) -> None:
    assert run_deaths("bytes", form, tmp_path) > 30


def test_killed_while_saving_several_files(tmp_path: Path) -> None:
    assert run_deaths("together", "", tmp_path) > 60


@pytest.mark.parametrize("form", [".pt", pytest.param(".safetensors", marks=pytest.mark.slow)])
def test_killed_at_any_moment(form: str, tmp_path: Path) -> None:
    """By the clock, while it saves over and over."""
    target = upswap.save(small(1), tmp_path / f"model{form}")
    for delay in (0.003, 0.05, 0.11, 0.2, 0):
        child = subprocess.Popen(
            [sys.executable, __file__, "forever", form, str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.read(1) == "r"
        if delay:
            time.sleep(delay)
        else:
            child.stdout.read(1)  # once a save is done, however slow the machine
        child.send_signal(signal.SIGKILL)
        child.communicate()
        loaded(target)


# ---- refused, or failing on the way


def test_the_target_is_guarded(tmp_path: Path) -> None:
    source = upswap.save(small(1), tmp_path / "source.pt")
    before = source.read_bytes()
    (tmp_path / "parent").symlink_to(tmp_path)
    (tmp_path / "link.pt").symlink_to(source)
    os.link(source, tmp_path / "hard.pt")
    spellings = [
        source,
        tmp_path / "parent" / "source.pt",
        tmp_path / "link.pt",
        tmp_path / "hard.pt",
        tmp_path / ".." / tmp_path.name / "source.pt",
        Path(os.path.relpath(source)),
    ]
    for spelling in spellings:
        for origin in (source, tmp_path / "link.pt"):
            with pytest.raises(SaveError, match="source itself"):
                upswap.save(small(2), spelling, source=origin, force=True)
    (tmp_path / "pipe.pt").parent.mkdir(exist_ok=True)
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "missing" / "model.pt")
    (tmp_path / "loop.pt").symlink_to(tmp_path / "loop.pt")
    for name, says in {
        "source.pt": "--force",
        "missing/model.pt": "no folder",
        "source.pt/model.pt": "no folder",
        "model.bin": "must end in",
        "pipe.pt": "not a regular file",
        "dangling.pt": "no folder",
        f"{'x' * 253}.pt": "cannot be written: File name too long",
        "x" * 256: "cannot be written: File name too long",
    }.items():
        with pytest.raises(SaveError, match=says):
            upswap.save(small(2), tmp_path / name, force=name != "source.pt")
    with pytest.raises(SaveError, match=r"loop\.pt"):
        upswap.save(small(2), tmp_path / "loop.pt")
    with pytest.raises(SaveError, match="is a folder"):
        atomic.check(tmp_path / "parent", force=True)
    assert source.read_bytes() == before
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    upswap.save(small(2), source, force=True)
    assert loaded(source) == 2
    assert (tmp_path / "hard.pt").read_bytes() == before


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model.pt").symlink_to(tmp_path / "elsewhere" / "real.pt")
    upswap.save(small(1), tmp_path / "model.pt")  # it leads nowhere yet
    upswap.save(small(2), tmp_path / "model.pt", force=True)
    assert (tmp_path / "model.pt").is_symlink()
    assert loaded(tmp_path / "elsewhere" / "real.pt") == 2
    assert names(tmp_path / "elsewhere") == ["real.pt"]


def test_a_file_someone_makes_during_the_save_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "model.pt"

    def fill(path: Path) -> None:
        path.write_text("ours")
        target.write_text("theirs")

    with pytest.raises(SaveError, match="--force"):
        atomic.write(target, fill)
    assert target.read_text() == "theirs"
    monkeypatch.setattr(os, "link", _failing(errno.EPERM))  # a file system without hard links
    target.unlink()
    with pytest.raises(SaveError, match="--force"):
        atomic.write(target, fill)
    assert target.read_text() == "theirs"
    target.unlink()
    atomic.write(target, lambda path: path.write_text("ours") and None)
    assert target.read_text() == "ours"
    assert names(tmp_path) == ["model.pt"]


def test_the_mode_of_a_file_stays_its_own(tmp_path: Path) -> None:
    target = tmp_path / "model.pt"
    atomic.write(target, lambda path: path.write_text("one") and None)
    (tmp_path / "other").touch()
    assert target.stat().st_mode == (tmp_path / "other").stat().st_mode
    target.chmod(0o600)
    atomic.write(target, lambda path: path.write_text("two") and None, force=True)
    assert target.stat().st_mode & 0o777 == 0o600
    for form in FORMS:  # safetensors by itself makes files for their owner alone
        path = upswap.save(small(), tmp_path / f"saved{form}")
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Root may write anywhere, so the answer of the system is stood in for.
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(SaveError, match="read-only"):
        upswap.save(small(), tmp_path / "model.pt")
    with pytest.raises(SaveError, match="read-only"):
        save_together(tmp_path / "saved", "new")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_in_truth(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SaveError, match="read-only"):
        upswap.save(small(), tmp_path / "model.pt")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("old", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_full_disk_in_the_middle_of_writing(form: str, old: bool, tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk's."""
    target = tmp_path / f"model{form}"
    if old:
        upswap.save(small(1), target)
    before = names(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (0, 1, 700, 8_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # Python ignores the signal, and the write fails
        try:
            with pytest.raises(SaveError, match="cannot be written"):
                upswap.save(small(2), target, force=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert names(tmp_path) == before
        assert not old or loaded(target) == 1


def _failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


#: The calls that change the disk.
STEPS = ("open", "chmod", "fsync", "link", "replace", "rename", "mkdir")


def fail_once_everywhere(
    monkeypatch: pytest.MonkeyPatch, number: int, prepare: Callable[[], None], work: Callable[[], None]
) -> Iterator[tuple[str, SaveError | None]]:
    """Do `work` again and again, each time with the next of its calls to the system failing, until none is left.

    Gives the call's name and the error that came of it.
    """
    for turn in range(1000):
        prepare()
        called: list[str] = []

        def stand_in(name: str, real: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                if "dir_fd" in kwargs:  # cleaning up
                    return real(*args, **kwargs)
                called.append(name)  # noqa: B023 - of this turn
                if len(called) == turn + 1:  # noqa: B023
                    raise OSError(number, os.strerror(number))
                return real(*args, **kwargs)

            return call

        raised = None
        with monkeypatch.context() as patched:
            for name in STEPS:
                patched.setattr(os, name, stand_in(name, getattr(os, name)))
            try:
                work()
            except SaveError as error:
                raised = error
        if len(called) <= turn:
            assert raised is None
            return
        yield called[turn], raised


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_every_step_may_fail(
    force: bool, number: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.pt"

    def prepare() -> None:
        target.unlink(missing_ok=True)
        if force:
            target.write_text("old")

    def work() -> None:
        atomic.write(target, lambda path: path.write_bytes(b"new") and None, force=force)

    failed: list[str] = []
    for step, error in fail_once_everywhere(monkeypatch, number, prepare, work):
        if error is None:
            assert target.read_text() == "new"
        else:
            failed.append(step)
            assert f"{target} cannot be written: {says}" in str(error)
            assert not force or target.read_text() == "old"
        assert names(tmp_path) == ([] if error and not force else ["model.pt"])
    # A link that fails is a file system without links; a mode or a folder that cannot be synced is no failure.
    assert failed == ["mkdir", "open", "open", "fsync"] + (["replace"] if force else [])


@pytest.mark.parametrize("old", [False, True])
def test_every_step_of_several_files_may_fail(old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "saved"

    def prepare() -> None:
        for path in list(home.iterdir()) if home.exists() else []:
            path.unlink()
        if old:
            home.mkdir(exist_ok=True)
            for name in NAMES:
                (home / name).write_text("old" * 1000)
        elif home.exists():
            home.rmdir()

    failed: list[str] = []
    for step, error in fail_once_everywhere(monkeypatch, errno.ENOSPC, prepare, lambda: save_together(home, "new")):
        if error is None:
            assert {path.read_text() for path in home.iterdir()} == {"new" * 1000}
        else:
            failed.append(step)
            assert "the disk is full" in str(error)
            if not old:
                assert not home.exists()
                continue
            assert {path.read_text() for path in home.iterdir()} == {"old" * 1000}
        assert names(home) == sorted(NAMES)
    # The last open is that of the folder, to lock it; then four or seven renamings.
    steps = ["mkdir", "open"] + ["open", "fsync"] * len(NAMES) + ["open"] + ["rename"] * (4 + 3 * old)
    assert failed == ([] if old else ["mkdir"]) + steps


def test_what_several_files_may_not_replace(tmp_path: Path) -> None:
    home = tmp_path / "saved"
    save_together(home, "old", force=False)
    (home / "README.md").write_text("mine")
    with pytest.raises(SaveError, match=r"saved/model\.safetensors exists already; --force"):
        save_together(home, "new", force=False)
    check_together_whole(home, True)
    save_together(home, "new")
    assert (home / "README.md").read_text() == "mine"
    (home / "config.json").unlink()
    (home / "config.json").mkdir()
    with pytest.raises(SaveError, match=r"holds a folder config\.json"):
        save_together(home, "newer")
    with pytest.raises(SaveError, match="is a file; name a folder"):
        save_together(home / "README.md", "new")
    with pytest.raises(SaveError, match="no folder"):
        save_together(tmp_path / "missing" / "saved", "new")
    assert (home / "model.safetensors").read_text() == "new" * 1000


def test_a_failing_fill_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(BaseException):
        pass

    def fill(path: Path) -> None:
        path.write_text("part")
        raise Interrupted

    with pytest.raises(Interrupted):
        atomic.write(tmp_path / "model.pt", fill)
    with pytest.raises(Interrupted):
        atomic.write_together(tmp_path / "saved", {"a": lambda path: path.touch(), "upswap.json": fill}, "upswap.json")
    assert names(tmp_path) == []


def test_temporary_files_of_the_living_stay(tmp_path: Path) -> None:
    """Only a dead process's file goes: two may save the same target at once, and the last one stays."""
    target = tmp_path / "model.pt"
    strangers = [".upswap-01234567-01234567.tmp", ".model.pt.01234567.tmp"]  # of another target, and not a name of ours
    for name in strangers:
        (tmp_path / name).mkdir()
    dead: list[Path] = []

    def fill(path: Path) -> None:
        dead.append(path.parent.with_name(f"{path.parent.name[:-12]}01234567.tmp"))
        dead[0].mkdir(exist_ok=True)
        (dead[0] / "new").touch()
        path.write_text("outer")
        atomic.write(target, lambda inner: inner.write_text("inner") and None)
        assert path.read_text() == "outer"
        assert target.read_text() == "inner"

    atomic.write(target, fill, force=True)
    assert target.read_text() == "outer"
    assert not dead[0].exists()
    assert names(tmp_path) == sorted([*strangers, "model.pt"])


#: 255 bytes each: the most that a name may have.
LONGEST = ("x" * 255, "\u00e9" * 127 + "x", "\U0001d54f" * 63 + "xyz")


@pytest.mark.parametrize("suffix", [*FORMS, ""])
@pytest.mark.parametrize("name", LONGEST, ids=["ascii", "two bytes", "four bytes"])
def test_the_longest_names(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / name.encode()[: 255 - len(suffix)].decode(errors="ignore")
    path = path.with_name(f"{path.name}{suffix}")
    upswap.save(small(1), path)
    upswap.save(small(2), path, force=True)
    assert upswap.load(path, None if suffix == ".pt" else small())[0].bias[0].item() == 2
    assert names(tmp_path) == [path.name]
    longer = path.with_name(f"\u00e9\u00e9{path.name}")
    for force in (False, True):
        with pytest.raises(SaveError, match="File name too long") as raised:
            upswap.save(small(1), longer, source=path, force=force)
        assert str(longer) in str(raised.value)
    with pytest.raises(SourceError, match=r"there is no file|File name too long"):
        upswap.load(longer)


def test_a_model_that_cannot_be_pickled(tmp_path: Path) -> None:
    model = small()
    model.hook = lambda x: x
    with pytest.raises(SaveError, match="cannot be pickled"):
        upswap.save(model, tmp_path / "model.pt")
    assert names(tmp_path) == []
    upswap.save(model, tmp_path / "model.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    how, form, place = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if how == "forever":
        print("r", end="", flush=True)
        while True:
            upswap.save(small(2), place / f"model{form}", force=True)
            print(".", end="", flush=True)
    print(die_together(place) if how == "together" else die_many_times(how, form, place))
