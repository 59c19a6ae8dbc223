"""A folder is the old model or the new one, whenever a save of it dies; how the host reads it is in test_host_folder.py.

Run as a script (`test_folder.py die FOLDER`, `test_folder.py save TARGET VALUE`),
it is the process that dies, or one of several at the same folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import upswap
from upswap import SaveError, SourceError, UpswapWarning
from upswap.files import atomic
from upswap.files.open_source import open_source

FILES = ["model.safetensors", "upswap.json", "upswap.safetensors"]


def net(value: float = 0.0) -> nn.Module:
    """With an upsampler once it is patched, and so with all the files of a folder but the host's configuration."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(8, 2, 1))
    for name in (0, 2):
        nn.init.constant_(model[name].bias, value)
    return model


def patched(value: float) -> nn.Module:
    """Every weight that tells is `value`, the upsampler's too, so that files of two saves together show."""
    model = upswap.patch(net(value), torch.zeros(1, 3, 32, 32))
    for parameter in upswap.parameters(model):
        nn.init.constant_(parameter, value)
    return model


def loaded(folder: Path) -> float:
    """The value of the model in a folder, which has to be whole."""
    model = upswap.load(folder, None if folder.suffix == ".pt" else net())
    values = {model[0].bias[0].item(), model[2].bias[0].item()}
    values |= {parameter.flatten()[0].item() for parameter in upswap.parameters(model)}
    assert len(values) == 1, "files of two saves"
    return values.pop()


def dies_at_rename(count: int, folder: Path, value: float) -> bool:
    """Whether a child that saves over `folder` and ends at renaming `count`, before it is made, came that far."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9), code
        return code == 9
    left = count

    def stand_in(real: object) -> object:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    code = 1
    try:
        model = patched(value)
        os.rename, os.replace = stand_in(os.rename), stand_in(os.replace)
        upswap.save(model, folder, force=True)
        code = 0
    finally:
        os._exit(code)


def die_at_every_rename(home: Path) -> None:
    """Old folder or none, the next to come a load or a save: after each death that is well, and nothing stays behind."""
    for old in (True, False):
        for then in ("load", "save"):
            count = 0
            while True:
                count += 1
                folder = home / f"{old}-{then}-{count}"
                if old:
                    upswap.save(patched(1), folder)
                (folder.mkdir(exist_ok=True), (folder / "README.md").write_text("mine"))
                died = dies_at_rename(count, folder, 2)
                told = check_next(folder, then, old)
                assert (folder / "README.md").read_text() == "mine"
                shutil.rmtree(folder)
                print(old, then, count, died, told)
                if not died:
                    break


def check_next(folder: Path, then: str, old: bool) -> bool:
    """Load or save; whether a finished save was told."""
    torn = not (folder / "upswap.json").exists()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UpswapWarning)
        if then == "load":
            if old or [path for path in folder.iterdir() if path.suffix in (".json", ".new")]:
                assert loaded(folder) in ((1, 2) if old else (2,))
            else:  # killed before anything took its place
                with pytest.raises(SourceError, match=r"without upswap\.json"):
                    loaded(folder)
        else:
            upswap.save(patched(3), folder, force=True)
            assert loaded(folder) == 3
    upswap.save(patched(4), folder, force=True)
    assert loaded(folder) == 4
    assert sorted(os.listdir(folder)) == ["README.md", *FILES]
    told = [str(warning.message) for warning in caught if "was cut off" in str(warning.message)]
    assert all(str(folder) in message for message in told)
    assert bool(told) == torn or not old
    return bool(told)


def script(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_killed_at_every_renaming(tmp_path: Path) -> None:
    done = script("die", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    for old, then in (("True", "load"), ("True", "save"), ("False", "load"), ("False", "save")):
        turns = [line for line in lines if line[:2] == [old, then]]
        assert len(turns) > 3
        assert [turn[3] for turn in turns] == ["True"] * (len(turns) - 1) + ["False"]
        assert any(turn[4] == "True" for turn in turns)


def test_a_cut_off_save_is_finished_whoever_comes_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cut_off(tmp_path / "saved")
    asked = upswap.files.checkpoint.says_how_it_is_built
    monkeypatch.setattr(os, "replace", _refused)
    with pytest.raises(SourceError, match=r"cannot be finished.*Permission denied") as raised:
        upswap.load(folder, net())
    assert str(folder) in str(raised.value)
    with pytest.raises(SaveError, match="Permission denied"):
        upswap.save(patched(3), folder, force=True)
    monkeypatch.undo()
    for use in (asked, lambda path: open_source(f"hf:{path}")):
        with pytest.warns(UpswapWarning, match="was cut off"), contextlib.suppress(SourceError):
            use(cut_off(folder))
        assert loaded(folder) == 2
    with (
        pytest.warns(UpswapWarning, match="was cut off"),
        pytest.raises(SaveError, match=r"exists already; --force"),
    ):
        upswap.save(patched(3), cut_off(folder))
    assert loaded(folder) == 2


def _refused(*_: object) -> None:
    raise PermissionError(13, "Permission denied")


def cut_off(folder: Path) -> Path:
    """A folder as a kill in the middle of its last save leaves it."""
    shutil.rmtree(folder, ignore_errors=True)
    upswap.save(patched(1), folder)
    upswap.save(patched(2), folder.with_name("new"), force=True)
    with atomic._temporary(folder / "upswap.json") as temporary:
        waiting = temporary.with_suffix(".new")
    folder.with_name("new").rename(waiting)
    (folder / "upswap.json").rename(waiting / "upswap.json.old")
    return folder


def test_what_a_folder_of_a_stranger_says_of_a_save_touches_nothing_else(tmp_path: Path) -> None:
    """Hidden names that lead out of the folder are not followed."""
    victim = upswap.save(patched(1), tmp_path / "victim")
    folder = cut_off(tmp_path / "saved")
    (waiting,) = folder.glob(".upswap-*.new")
    shutil.rmtree(waiting)
    waiting.symlink_to(victim)
    with pytest.raises(SourceError, match=r"without upswap\.json"):
        upswap.load(folder, net())
    with pytest.raises(SaveError, match="holds another model"):
        upswap.save(patched(2), folder, force=True)
    assert loaded(victim) == 1
    assert sorted(os.listdir(victim)) == FILES


def test_a_cut_off_save_of_a_strangers_brings_no_other_files(tmp_path: Path) -> None:
    """Unpacked over somebody's own folder, it would write over what is there."""
    folder = cut_off(tmp_path / "saved")
    (folder / "train.py").write_text("mine")
    (waiting,) = folder.glob(".upswap-*.new")
    for name in ("train.py", ".bashrc", "train.py.old"):
        (waiting / name).write_text("theirs")
    with pytest.warns(UpswapWarning, match="was cut off"):
        assert loaded(folder) == 2
    assert (folder / "train.py").read_text() == "mine"
    assert sorted(os.listdir(folder)) == [*FILES[:1], "train.py", *FILES[1:]]


def test_without_locks_what_has_lain_for_a_minute_is_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.fcntl, "flock", _refused)
    folder = cut_off(tmp_path / "saved")
    with pytest.raises(SourceError, match=r"without upswap\.json"):
        upswap.load(folder, net())
    (waiting,) = folder.glob(".upswap-*.new")
    os.utime(waiting, (0, 0))
    with pytest.warns(UpswapWarning, match="was cut off"):
        assert loaded(folder) == 2


@pytest.mark.parametrize(
    "form", ["", *(pytest.param(form, marks=pytest.mark.slow) for form in (".pt", ".safetensors"))]
)
def test_processes_at_one_target(form: str, tmp_path: Path) -> None:
    """Two save over and over, and each load in between gives a whole model of one of them."""
    target = upswap.save(patched(1), tmp_path / f"model{form}")
    savers = [
        subprocess.Popen([sys.executable, __file__, "save", str(target), value], stdout=subprocess.PIPE)
        for value in ("1", "2")
    ]
    try:
        for saver in savers:
            assert saver.stdout is not None
            saver.stdout.read(1)
        found = {loaded(target) for _ in range(12)}
    finally:
        for saver in savers:
            saver.terminate()
            saver.communicate()
    assert found <= {1, 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UpswapWarning)  # the end of the savers may have cut off the last
        upswap.save(patched(3), target, force=True)
    assert loaded(target) == 3
    assert os.listdir(tmp_path) == [target.name]


def test_files_of_the_source_are_not_written_over(tmp_path: Path) -> None:
    folder = upswap.save(patched(1), tmp_path / "saved")
    weights = folder / "model.safetensors"
    (tmp_path / "link").symlink_to(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for target, source in (
        (folder, weights),
        (tmp_path / "link", weights),
        (folder, tmp_path / "link" / "upswap.safetensors"),
        (weights, folder),
        (weights, f"hf:{tmp_path / 'link'}"),
        (folder, f"hf:{tmp_path / 'link'}"),
    ):
        with pytest.raises(SaveError, match="source itself"):
            upswap.save(patched(2), target, source=source, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for _ in range(2):  # beside them there is room
        upswap.save(patched(2), folder / "inside", source=folder, force=True)
        upswap.save(patched(2), folder / "inside.pt", source=folder, force=True)
    assert loaded(folder) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "die":
        die_at_every_rename(Path(sys.argv[2]))
    else:
        given = patched(float(sys.argv[3]))
        while True:
            upswap.save(given, sys.argv[2], force=True)
            print(".", end="", flush=True)
