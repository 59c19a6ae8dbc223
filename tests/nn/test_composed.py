"""Upsamplers made of others: the right one for a number of channels, chains to an exact size, and all of them reset."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from upswap import DySample, ShapeError
from upswap.nn import ByChannels, Cascade


def test_each_number_of_channels_has_its_own() -> None:
    module = ByChannels({4: DySample(4), 8: DySample(8)})
    with torch.no_grad():
        module.get_submodule("8").offset.bias.fill_(1.0)
    for channels in (4, 8):
        x = torch.randn(1, channels, 5, 6)
        assert torch.equal(module(x), module.get_submodule(str(channels))(x))
        assert module(x, (11, 13)).shape == (1, channels, 11, 13)
    with pytest.raises(ShapeError, match="C one of 4, 8"):
        module(torch.randn(1, 3, 5, 6))


def test_a_chain_ends_at_the_size_asked_for() -> None:
    module = Cascade([DySample(4, mode="nearest"), DySample(4, mode="nearest")])
    x = torch.randn(1, 4, 5, 6)
    torch.testing.assert_close(module(x), nn.functional.interpolate(x, scale_factor=4), rtol=1e-5, atol=1e-5)
    assert module(x, (21, 25)).shape == (1, 4, 21, 25)
    assert module(x, scale_factor=4.2).shape == (1, 4, 21, 25)


@pytest.mark.parametrize("make", [lambda *up: Cascade(up), lambda *up: ByChannels(dict(enumerate(up)))])
def test_resetting_resets_each(make) -> None:
    module = make(DySample(4), DySample(4), nn.Upsample(scale_factor=2))
    for parameter in module.parameters():
        parameter.data.fill_(1.0)
    module.reset_parameters()
    assert all(part.is_as_initialised() for part in module.modules() if isinstance(part, DySample))
