"""Files take their places together, or not at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
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
    bin_file, file = made(tmp_path / "made", "w.bin", "m")
    others = {weights: bin_file} if name != "net.onnx" else {}
    check_place(target)
    place(file, target, others)
    assert target.read_text() == "new m"
    assert weights.exists() == (name != "net.onnx")
    with pytest.raises(SaveError, match="force"):
        check_place(target)
    if weights.exists():
        target.unlink()
        with pytest.raises(SaveError, match="force"):
            check_place(target)
    check_place(target, force=True)
    place(file, target, others, force=True)


def test_weights_beside_a_graph(tmp_path: Path) -> None:
    target = tmp_path / "net.onnx"
    weights, file = made(tmp_path / "made", "w", "m")
    beside = {tmp_path / "net.onnx.data": weights}
    place(file, target, beside)
    assert (target.read_text(), (tmp_path / "net.onnx.data").read_text()) == ("new m", "new w")
    target.unlink()
    with pytest.raises(SaveError, match=r"net\.onnx\.data exists already"):
        place(file, target, beside)
    assert not target.exists()


def test_weights_of_the_graph_that_is_replaced(tmp_path: Path) -> None:
    target, data = tmp_path / "net.onnx", tmp_path / "net.onnx.data"
    weight = onnx.numpy_helper.from_array(np.zeros(2000, np.float32), "weight")
    graph = onnx.helper.make_model(onnx.helper.make_graph([], "net", [], [], [weight]))
    onnx.save(graph, target, save_as_external_data=True, location=data.name)
    assert data.exists()
    (small,) = made(tmp_path / "made", "small")
    place(small, target, {}, force=True)
    assert target.read_text() == "new small"
    assert not data.exists()
    data.write_text("somebody else's")
    place(small, target, {}, force=True)  # what was there refers to no weights
    assert data.read_text() == "somebody else's"


def test_what_a_file_says_of_itself_is_beside_it(tmp_path: Path) -> None:
    target, said = tmp_path / "net.pte", tmp_path / "net.pte.json"
    said.write_text("old")
    with pytest.raises(SaveError, match=r"net\.pte\.json exists already"):
        check_place(target)
    check_place(target, force=True)
    file, other = made(tmp_path / "made", "m", "j")
    place(file, target, {said: other}, force=True)
    assert (target.read_text(), said.read_text()) == ("new m", "new j")


def test_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "net.mlpackage"
    made(tmp_path / "made", "a")
    place(tmp_path / "made", target, {})
    made(tmp_path / "other", "b")
    with pytest.raises(SaveError, match="force"):
        check_place(target)
    place(tmp_path / "other", target, {}, force=True)
    assert [file.name for file in target.iterdir()] == ["b"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["made", "net.mlpackage", "other"]
    with pytest.raises(SaveError, match="no folder"):
        check_place(tmp_path / "missing" / "net.mlpackage")
