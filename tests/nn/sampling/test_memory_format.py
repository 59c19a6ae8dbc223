"""Memory formats: which one a map has, and large maps changed from one to the other, which torch does too, only slower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from upswap.nn.sampling import memory_format as layout

SHAPES = [(3, 24, 7, 9), (2, 70, 32, 32), (1, 5, 1, 8), (2, 1, 4, 4), (2, 6, 1, 1), (0, 8, 4, 4), (1, 33, 9, 5)]


def test_a_format_is_told_where_it_is_the_only_one() -> None:
    x = torch.empty(2, 3, 4, 5)
    assert not layout.is_channels_last(x)
    assert layout.is_channels_last(x.to(memory_format=torch.channels_last))
    assert layout.format_of(x.to(memory_format=torch.channels_last)) is torch.channels_last
    assert not layout.is_channels_last(torch.empty(2, 3, 1, 1).to(memory_format=torch.channels_last))  # both at once
    assert layout.format_of(x[:, ::2]) is torch.contiguous_format


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_large_map_is_changed_as_torch_changes_it(
    shape: tuple[int, ...], given: torch.memory_format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "_LARGE", 0)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=given)
    for some in (x, x[:, :, :, ::2], x.flip(0), x[:, 1:] if shape[1] > 1 else x):
        for change, wanted in (
            (layout.contiguous, torch.contiguous_format),
            (layout.channels_last, torch.channels_last),
        ):
            changed = change(some)
            expected = some.contiguous(memory_format=wanted)
            assert torch.equal(changed, expected)
            assert changed.stride() == expected.stride()
            assert changed.dtype == dtype
            assert (changed is some) == (expected is some)


class Copies(TorchDispatchMode):
    """How many copies into a part of something there were."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += func is torch.ops.aten.copy_.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("shape", "images", "slices"),
    [
        ((2, 70, 64, 64), 2, 5),  # planes 16 KiB apart: 16 channels at a time
        ((1, 70, 64, 63), 1, 3),  # 32
        ((2, 63, 64, 63), 0, 0),  # each image too small
    ],
)
def test_large_maps_are_changed_part_by_part(shape: tuple[int, ...], images: int, slices: int) -> None:
    x = torch.randn(shape)
    with Copies() as to_channels_last:
        changed = layout.channels_last(x)
    with Copies() as back:
        assert torch.equal(layout.contiguous(changed), x)
    assert (back.count, to_channels_last.count) == (images, slices)
