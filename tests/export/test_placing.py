"""Files take their places together, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from upswap.errors import SaveError
from upswap.export.placing import check_place, place


def made(folder: Path, *names: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"new {name}")
    return [folder / name for name in names]


@pytest.mark.parametrize("name", ["net.xml", "net.ncnn.param", "net.onnx"])
def test_files_and_their_weights(name: str, tmp_path: Path) -> None:
    target = tmp_path / name
    weights = target.with_suffix(".bin")
    files = made(tmp_path / "made", *(["w.bin"] if name != "net.onnx" else []), "m")
    check_place(target)
    place(files, target)
    assert target.read_text() == "new m"
    assert weights.exists() == (name != "net.onnx")
    with pytest.raises(SaveError, match="force"):
        check_place(target)
    if weights.exists():
        target.unlink()
        with pytest.raises(SaveError, match="force"):
            check_place(target)
    check_place(target, force=True)
    place(files, target, force=True)


def test_weights_beside_a_graph(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    place(made(tmp_path / "made", "w", "m"), target)
    assert (target.read_text(), (tmp_path / "net.onnx.data").read_text()) == ("new m", "new w")
    target.unlink()
    with pytest.raises(SaveError, match=r"net\.onnx\.data exists already"):
        place(made(tmp_path / "made", "w", "m"), target)
    assert not target.exists()


def test_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "net.mlpackage"
    made(tmp_path / "made", "a")
    place([tmp_path / "made"], target)
    made(tmp_path / "other", "b")
    with pytest.raises(SaveError, match="force"):
        check_place(target)
    place([tmp_path / "other"], target, force=True)
    assert [file.name for file in target.iterdir()] == ["b"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "net.mlpackage", "other"]
    with pytest.raises(SaveError, match="no folder"):
        check_place(tmp_path / "missing" / "net.mlpackage")
