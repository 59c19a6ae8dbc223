"""Calibration data from files and lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from deployed import IMAGES, patched
from upswap.errors import OptionError
from upswap.export.calibration import batches
from upswap.export.flat import Flat
from upswap.probe.inputs.inputs import as_inputs

FLAT = Flat(patched(), as_inputs(IMAGES))


def test_arrays_are_read_sample_by_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", IMAGES.numpy())
    np.savez(tmp_path / "b.npz", image=IMAGES.numpy(), other=np.zeros(3))
    for name in ("a.npy", "b.npz"):
        rows = batches(tmp_path / name, FLAT, [IMAGES])
        assert [row[0].shape for row in rows] == [(1, 3, 6, 5)] * 2
        assert torch.equal(torch.cat([row[0] for row in rows]), IMAGES)


def test_what_is_wrong_with_a_file_is_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "names.npz", picture=IMAGES.numpy())
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "wide.npy", IMAGES.double().numpy())
    (tmp_path / "text.npy").write_text("no array")
    np.savez(tmp_path / "object.npz", image=np.array([{}]), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array(["a"]))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "names.npz").read_bytes()[:60])
    for name, message in (
        ("names.npz", "has no image; it has picture"),
        ("objects.npy", "no .npy or .npz of arrays"),
        ("text.npy", "no .npy or .npz of arrays"),
        ("object.npz", "no .npy or .npz of arrays"),
        ("words.npy", "no .npy or .npz of arrays"),
        ("cut.npz", "no .npy or .npz of arrays"),
        ("wide.npy", "float64, and the model takes"),
    ):
        with pytest.raises(OptionError, match=message) as caught:
            batches(tmp_path / name, FLAT, [IMAGES])
        assert "pickle" not in str(caught.value)
    with pytest.raises(OptionError, match="a path or a list of inputs, not a Tensor"):
        batches(IMAGES, FLAT, [IMAGES])


def test_fixed_sizes_are_those_of_the_example(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, torch.cat((IMAGES, IMAGES, IMAGES[:1])).numpy())
    assert [row[0].shape for row in batches(path, FLAT, [IMAGES], fixed=True)] == [IMAGES.shape] * 2
    wide = torch.zeros(2, 3, 6, 7)
    assert batches([wide], FLAT, [IMAGES])[0][0] is wide
    with pytest.raises(OptionError, match=r"\(2, 3, 6, 7\) float32, and a file of fixed sizes takes \(2, 3, 6, 5\)"):
        batches([wide], FLAT, [IMAGES], fixed=True)
