"""What a run does to the containers of a model is undone, whatever kind of container it is."""

from __future__ import annotations

import dataclasses
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import pytest
import torch
from torch import nn

import upswap
from upswap.errors import UpswapWarning
from upswap.probe.preserve import leaving_no_trace
from upswap.probe.snapshot import Snapshot


class FrozenDict(OrderedDict):  # type: ignore[type-arg]
    """As diffusers has it: what it holds are its attributes too, and nothing of it can be set."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for key, value in self.items():
            setattr(self, key, value)
        self.__frozen = True

    def _refuse(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("frozen")

    __delitem__ = setdefault = pop = update = _refuse  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if getattr(self, "_FrozenDict__frozen", False):
            raise TypeError("frozen")
        super().__setattr__(name, value)

    def __setitem__(self, name: str, value: Any) -> None:
        if getattr(self, "_FrozenDict__frozen", False):
            raise TypeError("frozen")
        super().__setitem__(name, value)


class FrozenList(list):  # type: ignore[type-arg]
    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("frozen")

    __setitem__ = __iadd__ = append = extend = clear = _refuse  # type: ignore[assignment]


class Slotted(MutableMapping[str, Any]):
    """A mapping over `__slots__`, which counts how often it is asked for anything."""

    __slots__ = ("asked", "items_", "last")

    def __init__(self, **items: Any) -> None:
        self.items_, self.asked = items, 0

    def __getitem__(self, key: str) -> Any:
        self.asked += 1
        return self.items_[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.items_ = {**self.items_, key: value}
        self.last = key

    def __delitem__(self, key: str) -> None:
        raise TypeError("frozen")

    def __iter__(self) -> Iterator[str]:
        self.asked += 1
        return iter(self.items_)

    def __len__(self) -> int:
        self.asked += 1
        return len(self.items_)


class Odd:
    """Equal to nothing, not even asked."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("cannot be compared")

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        raise RuntimeError("is neither true nor false")


@dataclasses.dataclass
class Settings:
    size: int
    seen: list[int] = dataclasses.field(default_factory=list)


class Model(nn.Module):
    """Holds `held`, and does `change` to it in its forward."""

    def __init__(self, held: Any, change: Callable[[Any], object]) -> None:
        super().__init__()
        self.held = held
        self.__dict__["change"] = change
        self.up = nn.Upsample(scale_factor=2)
        self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(self.held)
        return self.last(self.up(self.first(x)))


def knot() -> list[Any]:
    items: list[Any] = [1]
    items.append({"self": items, "nested": [2]})
    return items


def deep() -> list[Any]:
    items: list[Any] = []
    for _ in range(5000):
        items = [items]
    return items


def innermost(items: list[Any]) -> list[Any]:
    while items:
        items = items[0]
    return items


def picture(value: Any, seen: tuple[int, ...] = ()) -> Any:
    """All that a value holds, with the identities of what has no parts."""
    if id(value) in seen:
        return "again"
    seen = (*seen, id(value))
    state = getattr(value, "__dict__", None)
    slots = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
    inside: list[Any] = [picture(v, seen) for v in slots]
    if isinstance(state, dict):
        inside += [(key, picture(v, seen)) for key, v in dict.items(state)]
    if isinstance(value, dict):
        base: Any = OrderedDict if isinstance(value, OrderedDict) else dict
        return [id(value), *inside, *((picture(k, seen), picture(v, seen)) for k, v in base.items(value))]
    if isinstance(value, list | tuple | deque):
        return [id(value), *inside, *(picture(v, seen) for v in type(value).__mro__[-2].__iter__(value))]
    if isinstance(value, set | frozenset):
        return [id(value), *inside, sorted(map(id, value))]
    if isinstance(value, torch.Tensor):
        return id(value), str(value.tolist())
    return (id(value), *inside)


def do(code: str) -> Callable[[Any], object]:
    def change(held: Any) -> None:
        exec(code, {"held": held, "OrderedDict": OrderedDict, "dict": dict, "torch": torch, "innermost": innermost})

    return change


CASES: dict[str, tuple[Callable[[], Any], str]] = {
    "a frozen dict": (lambda: FrozenDict(a=1, b=[2]), "held.b.append(3)"),
    "a frozen dict that its own base empties": (lambda: FrozenDict(a=1, b=2), "OrderedDict.clear(held)"),
    "the attributes of a frozen dict": (lambda: FrozenDict(a=1), "held.__dict__.clear()"),
    "the order of a frozen dict": (lambda: FrozenDict(a=1, b=2), "held.move_to_end('a')"),
    "a frozen list": (lambda: FrozenList([1, 2]), "list.append(held, 3)"),
    "a mapping proxy of a dict": (lambda: types.MappingProxyType({"a": [1]}), "held['a'].append(2)"),
    "a mapping over slots": (lambda: Slotted(a=1), "held['b'] = 2; len(held)"),
    "a mapping over slots, in place": (lambda: Slotted(a=[1]), "held.items_['a'].append(2)"),
    "a UserDict": (lambda: UserDict(a=1), "held['b'] = 2"),
    "a UserDict, replaced inside": (lambda: UserDict(a=1), "held.data = {}"),
    "a set": (lambda: {1, "a"}, "held.add(2)"),
    "a deque": (lambda: deque([1, 2], maxlen=2), "held.append(3)"),
    "a defaultdict": (lambda: defaultdict(list), "held['a'].append(1)"),
    "a Counter": (lambda: Counter("aab"), "held.update('c'); held['a'] -= 1"),
    "a bytearray": (lambda: bytearray(b"abc"), "held += b'd'"),
    "a dict in a list in a tuple": (lambda: ([{"a": 1}],), "held[0][0]['a'] = 2"),
    "a list that holds itself": (knot, "held[1]['nested'].append(3); held.pop(0)"),
    "a list five thousand deep": (deep, "innermost(held).append(1)"),
    "what cannot be compared": (lambda: [Odd(), {Odd(): Odd()}], "held[1].clear(); held.reverse()"),
    "a list of tensors": (lambda: [torch.zeros(2), torch.ones(2)], "held[0] += 1; held.append(held[0])"),
    "a tensor with a NaN": (lambda: torch.tensor([float("nan"), 1.0]), "held[1] = 2"),
    "a tensor that is made longer": (lambda: torch.ones(2), "held.resize_(5).zero_()"),
    "a tensor with other memory": (lambda: torch.ones(2), "held.data = torch.zeros(3)"),
    "plain data": (lambda: Settings(1), "held.size = 2; held.seen.append(1); held.new = 1"),
    "a namespace": (lambda: types.SimpleNamespace(a=1), "del held.a"),
    "a module that is no child": (lambda: [nn.BatchNorm2d(4)], "held[0](torch.randn(2, 4, 8, 8)); held[0].eval()"),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_container_holds_what_it_held(case: str, fails: bool) -> None:
    make, code = CASES[case]
    model = Model(make(), do(code + ("\nraise KeyError('a forward that fails')" if fails else "")))
    before = picture(model.held) if "deep" not in case else None
    try:
        upswap.inspect(model, torch.randn(2, 3, 8, 8))
    except upswap.UpswapError:
        assert fails
    if before is None:
        assert innermost(model.held) == []
    else:
        assert picture(model.held) == before


def test_the_same_container_in_two_modules() -> None:
    shared = FrozenDict(a=1)
    model = nn.Sequential(Model(shared, do("OrderedDict.__setitem__(held, 'b', 2)")), nn.Identity())
    model[1].config = shared
    upswap.inspect(model, torch.randn(1, 3, 8, 8))
    assert model[0].held is model[1].config
    assert list(OrderedDict.items(shared)) == [("a", 1)]


def test_what_did_not_change_is_not_touched() -> None:
    touched: list[str] = []

    class Watched(dict):  # type: ignore[type-arg]
        def __getattribute__(self, name: str) -> Any:
            touched.append(name)
            return super().__getattribute__(name)

        def __iter__(self) -> Iterator[Any]:
            touched.append("__iter__")
            return super().__iter__()

    slotted = Slotted(a=1)
    model = Model([Watched(a=1), slotted], lambda held: None)
    buffer = torch.zeros(2)
    model.register_buffer("buffer", buffer)
    upswap.inspect(model, torch.randn(1, 3, 8, 8))
    assert touched == []
    assert slotted.asked == 0
    assert buffer._version == 0


def test_weak_references_to_what_is_gone_do_not_come_back() -> None:
    keys = [Settings(1), Settings(2)]
    keys = [type("Key", (), {})() for _ in keys]
    cache = weakref.WeakKeyDictionary({key: index for index, key in enumerate(keys)})
    model = Model(cache, lambda held: None)
    with leaving_no_trace(model):
        keys.pop()
        cache[keys[0]] = 5
    assert list(cache.values()) == [0]
    assert len(cache.data) == 1


class WithSlots(nn.Module):
    __slots__ = ("count", "fresh")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @property
    def setting(self) -> int:
        return self._setting

    @setting.setter
    def setting(self, value: int) -> None:
        if hasattr(self, "_setting"):
            raise AttributeError("can be set once")
        self._setting = value


def test_slots_and_properties_of_a_module() -> None:
    model = WithSlots()
    model.setting = 1
    with leaving_no_trace(model):
        model.count, model.fresh, model.__dict__["_setting"] = 5, 6, 7
    assert (model.count, model.setting, hasattr(model, "fresh")) == (0, 1, False)


def test_the_class_and_the_dict_of_a_module() -> None:
    model = Model(None, lambda held: None)
    attributes = model.__dict__
    with leaving_no_trace(model):
        object.__setattr__(model, "__dict__", dict(attributes))
        model.__class__ = type("Other", (Model,), {})
    assert type(model) is Model
    assert model.__dict__ is attributes


def test_gradients_are_those_there_were() -> None:
    model = nn.Conv2d(1, 1, 1)
    with leaving_no_trace(model):
        model(torch.ones(1, 1, 2, 2)).sum().backward()
    assert model.weight.grad is None


def test_what_cannot_be_put_back_is_said_and_the_rest_goes_back() -> None:
    class Key:
        works = True

        def __hash__(self) -> int:
            if not self.works:
                raise RuntimeError("no more")
            return 1

    model = Model({Key(): 1}, lambda held: None)
    model.rest = {"a": 1}

    def spoil() -> None:
        model.held["b"] = 2
        Key.works = False
        model.rest.clear()

    with pytest.warns(UpswapWarning, match="held.*RuntimeError: no more"), leaving_no_trace(model):
        spoil()
    assert model.rest == {"a": 1}
    assert len(model.held) == 2, "emptied, and so worse than found"


def test_writing_to_a_parameter_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.warns(UpswapWarning, match=r"0\.weight.*written to"), leaving_no_trace(model), torch.no_grad():
        model[0].weight.zero_()


def test_every_function_that_runs_a_model_leaves_it_so() -> None:
    original, model = (Model(FrozenDict(a=1), do("OrderedDict.clear(held)")) for _ in range(2))
    model.load_state_dict(original.state_dict())
    x = torch.randn(1, 3, 8, 8)
    before = picture(model.held)
    upswap.inspect(model, x)
    upswap.patch(model, x)
    upswap.verify(original, model, x)
    assert picture(model.held) == before
    assert list(OrderedDict.items(original.held)) == [("a", 1)]
    upswap.unpatch(model)
    assert picture(model.held) == before


def test_a_snapshot_without_values_copies_none() -> None:
    model = nn.BatchNorm2d(3)
    snapshot = Snapshot(model, values=False)
    model.running_mean.add_(1)
    with pytest.warns(UpswapWarning, match="running_mean"):
        snapshot.restore()
