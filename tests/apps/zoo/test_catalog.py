"""Which file a source gets: one of its own, the same when the run goes on, and never one of the sources."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from upswap import SaveError
from upswap.apps.zoo import catalog

#: Sources whose names come to the same, by a number, a character that is replaced, case, or another spelling of a letter.
ALIKE = [
    "a/unet.pt",
    "b/unet.pt",
    "c/unet-2.pt",
    "d/unet.pth",
    "e/Unet.pt",
    "smp:unet?encoder_name=resnet18",
    "smp-unet-resnet18.pt",
    "f/a b.pt",
    "f/a_b.pt",
    "f/\u00e9.pt",
    "f/e\u0301.pt",
    f"g/{'x' * 200}.pt",
    f"h/{'x' * 199}y.pt",
    f"h/{'é' * 120}.pt",
]


def test_sources_of_like_names_have_files_of_their_own(tmp_path: Path) -> None:
    for seed in range(20):
        sources = random.Random(seed).sample(ALIKE, len(ALIKE))
        found = catalog.targets(sources, tmp_path, ".safetensors")
        assert list(found) == sources
        assert len({name.name.casefold() for name in found.values()}) == len(sources)
        for path in found.values():
            path.touch()  # within what a file system allows
            path.unlink()


def test_a_file_stays_a_sources_whatever_else_is_done_in_the_folder() -> None:
    folder, claimed = Path("out"), {}
    for sources in (ALIKE[:1], ALIKE[1:3], ALIKE[::-1], ALIKE):
        found = catalog.targets(sources, folder, ".pt", claimed)
        assert {source: found[source].name for source in claimed if source in found}.items() <= claimed.items()
        claimed |= {source: path.name for source, path in found.items()}
    assert len(set(claimed.values())) == len(ALIKE)


def test_a_source_is_no_target_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("out", "in", "other"):
        Path(name).mkdir()
    for name in ("in/unet.pt", "in/fpn.pt", "other/linked.pt"):
        Path(name).touch()
    Path("link").symlink_to("out")
    Path("out/fpn.pt").touch()
    os.link("out/fpn.pt", "other/hard.pt")
    os.symlink("../other/linked.pt", "out/model.pt")
    for sources in (
        ["in/unet.pt", "out/unet.pt"],  # not there yet
        ["out/unet.pt"],
        ["in/unet.pt", "link/../out/unet.pt"],
        ["in/unet.pt", str(tmp_path / "link" / "unet.pt")],
        ["other/hard.pt", "in/fpn.pt"],
        ["other/linked.pt", "in/model.pt"],
    ):
        with pytest.raises(SaveError, match=r"is a source of this run as well: .*Name another folder with -o"):
            catalog.targets(sources, Path("out"), ".pt")
    assert catalog.targets(["nosuch:scheme", "in/" + "x" * 300, "in/unet.pt"], Path("out"), ".pt")
