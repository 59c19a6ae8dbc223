"""A load that is busy far too long is ended, whatever it is busy with."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import upswap
from upswap import SourceError
from upswap.files.formats import host_architecture, host_folder
from upswap.files.formats import safetensors as portable
from upswap.files.safety import time_limit
from upswap.files.safety.time_limit import loading_within_bounds
from work import calls_made


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {"_SECONDS": 1.0, "_SLOW": 0.2, "_AGAIN": 0.3, "_EVERY": 0.02}.items():
        monkeypatch.setattr(time_limit, name, value)
    path = tmp_path / "model.pt"
    path.write_bytes(b"x")
    return path


def _for_ever() -> None:
    while True:
        pass


def _catching_everything() -> None:
    while True:
        with contextlib.suppress(Exception):
            _for_ever()


class _Dying:
    def __del__(self) -> None:
        end = time.process_time() + 1.3
        while time.process_time() < end:
            pass


# An error inside `__del__` is lost, which is one of the cases: pytest would tell of it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_whatever_it_is_busy_with(file: Path) -> None:
    def thrown_away() -> None:
        one: Any = _Dying()
        del one  # an error in there is lost
        _for_ever()

    for busy in (_for_ever, _catching_everything, thrown_away):
        start = time.process_time()
        with (
            pytest.raises(SourceError, match=r"model\.pt is refused: it takes more than 1 s"),
            loading_within_bounds(file),
        ):
            busy()
        assert time.process_time() - start < 10


def test_plain_objects_are_memory_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "_BYTES", 100 * 2**20)
    monkeypatch.setattr(time_limit, "_SECONDS", 60.0)
    with pytest.raises(SourceError, match="GiB of memory"), loading_within_bounds(file):
        [[number] for number in range(10**9)]


def test_nothing_comes_afterwards_and_other_errors_pass(file: Path) -> None:
    for _ in range(20):
        with loading_within_bounds(file):
            pass
    with pytest.raises(KeyError), loading_within_bounds(file):
        raise KeyError("x")
    end = time.process_time() + 1.5
    while time.process_time() < end:
        pass
    assert calls_made(lambda: str(1)) < 100  # Python can still be profiled


def test_one_that_comes_at_the_end_is_not_left_for_later(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "_SECONDS", -1.0)  # at once
    monkeypatch.setattr(time_limit, "_EVERY", 0.001)
    refused = 0
    for index in range(100):
        try:
            with loading_within_bounds(file):
                time.sleep(0.0005 + index * 0.00001)
        except SourceError:
            refused += 1
        sum(range(100))
    assert refused


@contextlib.contextmanager
def _patient(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(time_limit, "_SECONDS", 60.0)
    with loading_within_bounds(file):
        yield


def test_one_bound_inside_another_says_what_was_exceeded(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = loading_within_bounds(file)
    with pytest.raises(SourceError, match=r"it takes more than 1 s to load"), outer, _patient(file, monkeypatch):
        _for_ever()


def test_a_larger_file_may_take_longer(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "_SECONDS_EACH_MEBIBYTE", 10.0 * 2**20)
    with loading_within_bounds(file):
        end = time.process_time() + 2
        while time.process_time() < end:
            pass


def test_a_table_made_by_four_loops(file: Path) -> None:
    """LeViT has one of all pairs of pixels, made in plain Python."""
    settings = {"architectures": ["LevitForImageClassification"], "model_type": "levit", "image_size": 4096}
    (file.parent / host_architecture.CONFIG).write_text(json.dumps(settings))
    portable.write({"weight": torch.zeros(64)}, {"format": "pt"}, file.parent / host_architecture.WEIGHTS)
    with pytest.raises(SourceError, match="to load, far more than a file of its size"):
        host_folder.open_folder(file.parent)


@pytest.mark.parametrize("name", ["model.safetensors", "folder"])
def test_a_model_of_the_users_own_may_take_its_time(name: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading the file may not, which is not the model's."""
    bounds: list[str] = []

    @contextlib.contextmanager
    def spied(path: Path) -> Any:
        bounds.append("begin")
        yield
        bounds.append("end")

    class Own(torch.nn.Conv2d):
        def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
            bounds.append("own")
            return super().load_state_dict(*args, **kwargs)

    for place in ("checkpoint", "formats.folder"):
        monkeypatch.setattr(f"upswap.files.{place}.loading_within_bounds", spied)
    path = upswap.save(torch.nn.Conv2d(1, 1, 1), file.parent / name)
    upswap.load(path, Own(1, 1, 1))
    assert bounds == ["begin", "end", "own"]
    bounds.clear()
    with pytest.raises(SourceError):
        upswap.load(path)
    assert bounds[0] == "begin"
