from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from upswap import InputError
from upswap.inputs import Inputs, as_inputs, build, describe, enlarged, example_inputs_for, map_tensors

X = torch.zeros(1, 3, 4, 4)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, 2), (X, 2), {}),
        ([X, 2], (X, 2), {}),
        ({"x": X}, (), {"x": X}),
        (((X,), {"flag": True}), (X,), {"flag": True}),
        (([X], {}), (X,), {}),
        (([X, X],), ([X, X],), {}),
        (({"image": X},), ({"image": X},), {}),
    ],
)
def test_the_forms_of_example_inputs(given: object, args: object, kwargs: object) -> None:
    inputs = as_inputs(given)
    assert str(inputs.args) == str(args)
    assert str(inputs.kwargs) == str(kwargs)


@pytest.mark.parametrize("given", [3, "image", None, X.numpy()])
def test_what_is_no_input_is_refused(given: object) -> None:
    with pytest.raises(InputError, match="pass a tensor"):
        as_inputs(given)


def test_inferred_inputs_follow_the_first_convolution() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(5, 2, 1).double(), nn.Conv2d(2, 9, 1))
    (image,) = example_inputs_for(model, (32, 48)).args
    assert image.shape == (1, 5, 32, 48)
    assert image.dtype == torch.float64
    assert example_inputs_for(model).args[0].shape == (1, 5, 64, 64)


def test_inferring_takes_no_random_numbers() -> None:
    model = nn.Conv2d(1, 1, 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = example_inputs_for(model).args[0]
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, example_inputs_for(model).args[0])


def test_nothing_to_infer_from_says_what_to_pass() -> None:
    with pytest.raises(InputError, match="pass example_inputs"):
        example_inputs_for(nn.Linear(3, 3))
    with pytest.raises(InputError, match="positive"):
        example_inputs_for(nn.Conv2d(3, 3, 1), (0, 5))


def test_descriptions_are_plain_data_and_build_the_same_again() -> None:
    value = Inputs(
        (torch.zeros(2, 3, dtype=torch.int64), [1, (2.5, None)], torch.Size([4, 5])), {"mode": "x", "on": True}
    )
    description = json.loads(json.dumps(describe(value)))
    again = build(description, lambda shape, dtype: torch.ones(shape, dtype=dtype))
    assert isinstance(again, Inputs)
    assert again.args[0].shape == (2, 3)
    assert again.args[0].dtype == torch.int64
    assert again.args[1:] == ([1, (2.5, None)], torch.Size([4, 5]))
    assert again.kwargs == {"mode": "x", "on": True}


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": {3}}, nn.ReLU()])
def test_what_cannot_be_described_is_refused(value: object) -> None:
    with pytest.raises(InputError):
        describe(value)


def test_enlarged_changes_images_only() -> None:
    bigger = enlarged(
        Inputs((torch.zeros(2, 3, 64, 33), torch.zeros(7), torch.zeros(1, 1, 8, 8, dtype=torch.int64)), {})
    )
    assert [tuple(t.shape) for t in bigger.tensors()] == [(2, 3, 96, 66), (7,), (1, 1, 8, 8)]
    wider = enlarged(Inputs((torch.zeros(2, 3, 64, 96),), {}), height=False)
    assert [tuple(t.shape) for t in wider.tensors()] == [(2, 3, 64, 128)]


def test_map_tensors_keeps_structure() -> None:
    import collections

    pair = collections.namedtuple("pair", "a b")
    value = {"p": pair(X, 1), "l": [X, (X,)], "s": torch.Size([1, 2])}
    mapped = map_tensors(value, lambda t: t + 1)
    assert type(mapped["p"]) is pair
    assert mapped["p"].a.sum() == X.numel()
    assert mapped["s"] == torch.Size([1, 2])
    assert type(mapped["s"]) is torch.Size
