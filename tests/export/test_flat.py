"""A model as a function of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from upswap.errors import InputError
from upswap.export.flat import Flat
from upswap.probe.inputs.inputs import Inputs, as_inputs


class Model(nn.Module):
    def forward(self, images: list[torch.Tensor], scale: float, *, mask: torch.Tensor | None = None) -> dict[str, Any]:
        first = images[0] * scale + (0 if mask is None else mask)
        return {"out": first, "aux": (images[1], None), "a b": images[1] + 1}


def test_structures_come_and_go() -> None:
    a, b, mask = torch.ones(2), torch.zeros(3), torch.ones(2)
    flat = Flat(Model(), Inputs(([a, b], 3.0), {"mask": mask}))
    assert flat.input_names == ["images_0", "images_1", "mask"]
    flat.name_outputs([a, b, mask])
    assert flat.output_names == ["out", "aux_0", "a_b"]
    found = flat(a, b, 2 * mask)
    assert [tensor.tolist() for tensor in found] == [[5, 5], [0, 0, 0], [1, 1, 1]]


def test_names_are_distinct_and_no_numbers() -> None:
    class Two(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> Any:
            return [tensors[0], {"0": tensors[1]}, {"x.y": tensors[0], "x/y": tensors[1]}]

    tensors = [torch.ones(1), torch.ones(1)]
    flat = Flat(Two(), as_inputs(tuple(tensors)))
    assert flat.input_names == ["tensors", "input_1"]
    flat.name_outputs(tensors)
    assert len(set(flat.output_names)) == 4
    assert all(name.isidentifier() for name in flat.output_names)


def test_a_model_without_outputs() -> None:
    class Nothing(nn.Module):
        def forward(self, x: torch.Tensor) -> None: ...

    with pytest.raises(InputError, match="Nothing gives no tensor to export"):
        Flat(Nothing(), as_inputs(torch.ones(1))).name_outputs([torch.ones(1)])


@dataclasses.dataclass
class Maps:
    first: torch.Tensor
    rest: list[torch.Tensor] | None = None
    name: str = ""


def test_dataclasses_are_structures() -> None:
    class Doubles(nn.Module):
        def forward(self, maps: Maps) -> list[Maps]:
            assert maps.rest is not None
            return [Maps(2 * maps.first), Maps(maps.rest[0], [maps.first], maps.name)]

    flat = Flat(Doubles(), as_inputs((Maps(torch.ones(1), [torch.zeros(1)]),)))
    assert flat.input_names == ["maps_first", "maps_rest_0"]
    flat.name_outputs([torch.ones(1), torch.zeros(1)])
    assert flat.output_names == ["output_0_first", "output_1_first", "output_1_rest_0"]
    assert [tensor.item() for tensor in flat(torch.ones(1), torch.zeros(1))] == [2, 0, 1]
