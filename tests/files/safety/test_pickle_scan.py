"""What a `.pt` may cost: files that claim, nest or compress more than a model's would."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import upswap
from fuzz.calls import GET, PUT, bounds_of
from fuzz.guard import Peak
from fuzz.mutate import packed, unpacked
from fuzz.seeds import seeds
from raw_pickle import Call, Global, New, Raw, pickled, records, write_pt
from upswap import SourceError, UntrustedFileError, UpswapError, UpswapWarning
from upswap.files.safety.pickle_scan import instructions
from work import calls_made


def calls() -> dict[str, Any]:
    """Calls that torch's own list of safe functions lets a file make."""
    storage = Raw(b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ")
    return {
        "bytearray": Call(Global("builtins", "bytearray"), 10**12),
        "bytearray of a codec of quadratic cost": Call(Global("builtins", "bytearray"), "é" * 10**6, "punycode"),
        "bytearray of a list": Call(Global("builtins", "bytearray"), [1, 2]),
        "bytearray by its old name": Call(Global("__builtin__", "bytearray"), 10**12),
        "a tensor": Call(Global("torch", "Tensor"), 10**6, 10**6),
        "a legacy tensor": Call(Global("torch", "FloatTensor"), 10**12),
        "a storage": Call(Global("torch.storage", "UntypedStorage"), 10**12),
        "a storage, by NEWOBJ": New(Global("torch.storage", "UntypedStorage"), 10**12),
        "a tensor written out": Call(
            Global("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"), storage, Global("torch", "float64"), "cpu", False
        ),
        "a codec of quadratic cost": Call(Global("_codecs", "encode"), "é" * 10**6, "punycode"),
        "bytearray by way of a tensor's rebuilding": Call(
            Global("torch._tensor", "_rebuild_from_type_v2"), Global("builtins", "bytearray"), Global("torch", "Tensor"),
            (10**12,), {},
        ),
        "bytearray in a list of functions": Call(Raw(b"](cbuiltins\nbytearray\ne"), 10**12),
    }  # fmt: skip


@pytest.mark.parametrize("name", list(calls()))
def test_a_file_cannot_call_for_memory_or_time(name: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "evil.pt", pickled(calls()[name]))
    memory, start = Peak(), time.process_time()
    with pytest.raises(SourceError, match=r"evil\.pt is refused: (it tries to call|it encodes|its pickle calls)"):
        upswap.load(path)
    assert memory.megabytes() < 100
    assert time.process_time() - start < 5


def test_torch_itself_makes_such_calls(tmp_path: Path) -> None:
    """So that the tests above can fail."""
    path = write_pt(tmp_path / "evil.pt", pickled(Call(Global("builtins", "bytearray"), 10**6)))
    assert torch.load(path, weights_only=True) == bytearray(10**6)
    path = write_pt(tmp_path / "evil.pt", pickled(Call(Global("_codecs", "encode"), "é", "punycode")))
    assert torch.load(path, weights_only=True) == "é".encode("punycode")


# As the key of a dict, which is hashed.
_DEEP = b"\x80\x02})" + b"\x85" * 400_000 + b"Ns."
_PAIRS = b"\x80\x02})" + b"N\x86" * 400_000 + b"Ns."
_SHAPES = b"\x80\x02})" + b"q\x01h\x01\x85" * 400_000 + b"Ns."


@pytest.mark.parametrize("data", [_DEEP, _PAIRS, _SHAPES], ids=["tuples", "pairs", "through the memo"])
def test_tuples_nested_so_deep_that_hashing_them_would_kill_the_process(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nests tuples more than"):
        upswap.load(write_pt(tmp_path / "deep.pt", data))


def test_such_tuples_do_kill_a_process(tmp_path: Path) -> None:
    path = write_pt(tmp_path / "deep.pt", _DEEP)
    code = f"import torch; torch.load({str(path)!r}, weights_only=True)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode < 0


def _archive(path: Path, entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.fixture
def saved(tmp_path: Path) -> dict[str, bytes]:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    return records(tmp_path / "model.pt")


def test_compressed_records_are_refused_before_they_are_opened(saved: dict[str, bytes], tmp_path: Path) -> None:
    bomb = {name: bytes(2**29) if name.endswith("data.pkl") else data for name, data in saved.items()}
    path = _archive(tmp_path / "bomb.pt", list(bomb.items()), zipfile.ZIP_DEFLATED)
    del bomb
    assert path.stat().st_size < 2**20
    memory = Peak()
    with pytest.raises(SourceError, match=r"model/data\.pkl is compressed.*save it with torch\.save"):
        upswap.load(path)
    assert memory.megabytes() < 100


@pytest.mark.filterwarnings("ignore:Duplicate name")  # of zipfile: it is what the file is to have
def test_two_records_of_one_name(saved: dict[str, bytes], tmp_path: Path) -> None:
    path = _archive(tmp_path / "two.pt", [*saved.items(), ("model/data.pkl", b"\x80\x02N.")])
    with pytest.raises(SourceError, match="several records of one name"):
        upswap.load(path)


def test_records_that_share_their_bytes(saved: dict[str, bytes], tmp_path: Path) -> None:
    """A thousand entries of the table of contents that lead to one record of a megabyte."""
    path = tmp_path / "overlapping.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in saved.items():
            archive.writestr(name, data)
        archive.writestr("model/data/000", bytes(2**20))
        for index in range(1, 1000):
            info = zipfile.ZipInfo(f"model/data/{index:03}")
            first = archive.getinfo("model/data/000")
            for attribute in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(info, attribute, getattr(first, attribute))
            archive.filelist.append(info)
            archive.NameToInfo[info.filename] = info
    with pytest.raises(SourceError, match=r"longer than the file|damaged"):
        upswap.load(path)


def test_a_tensor_larger_than_its_storage(saved: dict[str, bytes], tmp_path: Path) -> None:
    data = saved["model/data.pkl"].replace(b"K\x02K\x02\x86", b"J\x00\x00\x00\x40J\x00\x00\x00\x40\x86", 1)
    assert data != saved["model/data.pkl"]
    with pytest.raises(SourceError, match=r"other arguments than torch\.save does"):
        upswap.load(_archive(tmp_path / "model.pt", list({**saved, "model/data.pkl": data}.items())))


def test_more_names_or_structure_than_any_model_has(tmp_path: Path) -> None:
    names = b"".join(b"ctorch.nn.modules.linear\nLinear%d\n0" % index for index in range(600))
    with pytest.raises(SourceError, match="asks for 600 classes"):
        upswap.load(write_pt(tmp_path / "names.pt", b"\x80\x02" + names.replace(b"\n0", b"\n") + b"."))
    with pytest.raises(SourceError, match="more than the structure of any model"):
        upswap.load(write_pt(tmp_path / "long.pt", b"\x80\x02" + b"\x8f" * (33 * 2**20) + b"."))


@pytest.mark.parametrize("data", [b"\x80\x02(((", b"\x80\x02h\x07.", b"\x80\x02R.", b"\x80\x02X\xff\xff\xff\xff.", b""])
def test_instructions_that_lead_nowhere(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="damaged"):
        upswap.load(write_pt(tmp_path / "broken.pt", data))


def test_another_table_of_contents_than_python_sees(saved: dict[str, bytes], tmp_path: Path) -> None:
    """Data put before an archive: Python's zipfile looks for the table relative to the end, torch from the start."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in saved.items():
            archive.writestr(name, data if not name.endswith("data.pkl") else bytes(2**26))
    path = _archive(tmp_path / "model.pt", list(saved.items()))
    path.write_bytes(whole.getvalue() + path.read_bytes())
    with pytest.raises(SourceError):
        upswap.load(path)


def test_what_torch_save_writes_of_other_values_is_looked_through_too(tmp_path: Path) -> None:
    """Numbers, text and containers of every kind that pickles have go through without a call."""
    module = nn.Identity()
    module.values = [
        1,
        -1,
        70_000,
        2**40,
        -(2**70),
        1.5,
        "é",
        None,
        True,
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        tuple(range(9)),
        {1},
        1j,
    ]
    module.more = {"a": {"b": [torch.Size([1]), torch.float16, torch.device("cpu"), b"bytes"]}}
    torch.save(module, tmp_path / "model.pt")
    got: Any = upswap.load(tmp_path / "model.pt")
    assert got.values == module.values
    assert got.more == module.more


def test_pickles_of_another_protocol_say_so(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt", pickle_protocol=pickle.HIGHEST_PROTOCOL)
    with pytest.raises(SourceError, match="pickle form that is never loaded"):
        upswap.load(tmp_path / "model.pt")


# -- shared values, and counts --------------------------------------------------------------------------------------------


def _module(value: Any) -> Any:
    """An `nn.Identity` whose attribute `x` is this."""
    return New(Global("torch.nn.modules.linear", "Identity"), state={"x": value})


def _doubled(value: Any, double: Any, depth: int = 60) -> Any:
    """A container with `value` twice, one with that twice, and so on."""
    for _ in range(depth):
        value = double(value)
    return value


#: Pairs of pairs. Python would hash them to put them into a dict, and so they are written by hand.
_PAIR = Raw(b"Nq\x7f" + b"h\x7f\x86q\x7f" * 60)
_LIST = _doubled(None, lambda value: [value, value])


def _shared() -> dict[str, Any]:
    record = {"path": "", "sites": [], "forward": _LIST, "schema": 2}
    return {
        "lists": _module(_LIST),
        "dicts": _module(_doubled(None, lambda value: {"a": value, "b": value})),
        "pairs": _module(_PAIR),
        "the key of a dict": _module(Raw(b"}" + _PAIR + b"Ns")),
        "an item of a set": _module(Call(Global("builtins", "set"), [_PAIR])),
        "the value of an enumeration": _module(Call(Global("torchvision.models.resnet", "ResNet18_Weights"), _PAIR)),
        "an argument of a size": _module(Call(Global("torch", "Size"), _LIST)),
        "modules": Raw(_sequentials(60)),
        "the description of a rewritten module": Call(
            Global("upswap.surgery", "restore"), Global("torch.nn.modules.linear", "Identity"), record, state={}
        ),
    }


def _sequentials(depth: int) -> bytes:
    """A Sequential with another one twice, and so on."""
    begin = b"ctorch.nn.modules.container\nSequential\n)\x81}" + pickled("_modules")[2:-1] + b"}"
    twice = pickled("a")[2:-1] + b"%s" + pickled("b")[2:-1] + b"h\x7f"
    inner = begin + b"sb"
    for _ in range(depth):
        inner = begin + b"(" + twice.replace(b"%s", inner + b"q\x7f") + b"usb"
    return b"\x80\x02" + inner + b"."


@pytest.mark.parametrize("name", list(_shared()))
def test_values_that_share_their_parts_are_not_walked_for_ever(name: str, tmp_path: Path) -> None:
    """Of 60 levels, each with the one below twice: two to the sixtieth visits, in a file of some kilobytes."""
    path = write_pt(tmp_path / "shared.pt", pickled(_shared()[name]))
    start = time.process_time()
    with pytest.raises(SourceError, match=r"going through|other arguments"):
        upswap.load(path)
    assert time.process_time() - start < 5


def test_values_that_contain_themselves(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop += [loop, loop]
    with pytest.raises(SourceError, match="inside itself"):
        upswap.load(write_pt(tmp_path / "loop.pt", pickled(_module(loop))))
    model = nn.Sequential(nn.Sequential())
    model[0].add_module("above", model)
    torch.save(model, tmp_path / "above.pt")
    with pytest.raises(SourceError, match="inside itself"):
        upswap.load(tmp_path / "above.pt")


def test_keys_that_all_hash_to_one_number(tmp_path: Path) -> None:
    for count, keys in ((20_000, "numbers"), (20_000, "pairs")):
        modulus = sys.hash_info.modulus
        made = {(-1, index) if keys == "pairs" else index * modulus: None for index in range(0, count, count // 2500)}
        with pytest.raises(SourceError, match="keys that are neither text nor plain numbers"):
            upswap.load(write_pt(tmp_path / "keys.pt", pickled(_module(made))))
    model: Any = nn.Identity()
    model.x = {index: str(index) for index in range(10_000)}
    torch.save(model, tmp_path / "keys.pt")
    got: Any = upswap.load(tmp_path / "keys.pt")
    assert got.x == model.x


def test_a_number_that_a_class_counts_to_while_it_is_restored(tmp_path: Path) -> None:
    model = nn.LSTM(2, 2)
    model.__dict__["_all_weights"] = [[None]]  # as torch wrote it once; then the names are made anew
    for count, says in (
        (10**12, "gives a torch.nn.modules.rnn.LSTM the number 1000000000000"),
        (-(10**9), "number -1000"),
    ):
        model.num_layers = count
        torch.save(model, tmp_path / "lstm.pt")
        start = time.process_time()
        with pytest.raises(SourceError, match=says):
            upswap.load(tmp_path / "lstm.pt")
        assert time.process_time() - start < 5
    model.num_layers = 1
    torch.save(model, tmp_path / "lstm.pt")
    assert isinstance(upswap.load(tmp_path / "lstm.pt"), nn.LSTM)


def test_what_would_be_refused_for_its_cost_is_told_when_it_is_saved(tmp_path: Path) -> None:
    model = nn.Identity()
    model.x = _LIST
    with pytest.warns(UpswapWarning, match=r"will refuse it.*going through"):
        upswap.save(model, tmp_path / "model.pt")


@pytest.mark.parametrize("double", [lambda value: [value, None], lambda value: {"a": value}], ids=["lists", "dicts"])
def test_looking_through_a_pickle_takes_work_by_its_length(double: Any) -> None:
    def work(depth: int) -> int:
        data = b"".join(
            [b"\x80\x02", b"](" * depth, b"N" * depth, b"e" * depth, pickled(double(1))[2:-1] * depth, b"."]
        )
        return calls_made(lambda: instructions(data, ()))

    some, twice = work(2_000), work(4_000)
    assert some > 2_000
    assert twice < 2.1 * some


def storage(key: Any, size: int, kind: str = "FloatStorage") -> Raw:
    """What BINPERSID makes."""
    return Raw(pickled(("storage", Global("torch", kind), key, "cpu", size))[2:-1] + b"Q")


def tensor(of: Any, size: tuple[int, ...], stride: tuple[int, ...]) -> Call:
    hooks = Call(Global("collections", "OrderedDict"))
    return Call(Global("torch._utils", "_rebuild_tensor_v2"), of, 0, size, stride, False, hooks)


def _odd() -> dict[str, Any]:
    """Calls of functions that files of models do call, with other arguments."""
    many = tensor(storage("0", 1), (10**6,), (0,))  # all of one number
    rebuild, range_ = Global("torch._tensor", "_rebuild_from_type_v2"), Global("builtins", "range")
    empty = New(Global("torch.nn.parameter", "Parameter"), None, False)
    layout = Call(Global("torch.serialization", "_get_layout"), "torch.sparse_coo")
    indices = tensor(storage("0", 1, "LongStorage"), (1, 10**10), (0, 0))
    instead = {"items": 5, "keys": 5}
    one, nothing = tensor(storage("0", 1), (1,), (1,)), Call(Global("collections", "OrderedDict"))
    far, parameter = tensor(storage("0", 997), (250,) * 4, (1,) * 4), "_rebuild_parameter_with_state"
    return {
        **{
            f"a tensor whose {key} the file sets": with_attributes({key: value})
            for key, value in {
                "real": one,
                "data": many,
                "__class__": Global("torch.nn.parameter", "Parameter"),
                "requires_grad": True,
                "numel": 1,
                "_backward_hooks": {},
                7: 1,
            }.items()
        },
        "a tensor whose slots the file sets": with_attributes((None, {"real": one})),
        "a tensor whose state is no dict": with_attributes(Call(Global("collections", "OrderedDict"))),
        "a parameter whose real the file sets": Call(
            Global("torch._utils", parameter), one, False, nothing, {"real": one}
        ),
        "a tensor that overlaps itself": far,
        "a tensor that overlaps itself, beside a stride of 0": tensor(
            storage("0", 997), (1, *(250,) * 4), (0, *(1,) * 4)
        ),
        "a set of a tensor": Call(Global("builtins", "set"), many),
        "a set of the items of a call": Call(Global("builtins", "set"), Call(Global("collections", "deque"))),
        "a Counter of a tensor": Call(Global("collections", "Counter"), many),
        "a Counter of a text": Call(Global("collections", "Counter"), "a" * 100),
        "an OrderedDict of a tensor": Call(Global("collections", "OrderedDict"), [many]),
        "a Size of a tensor": Call(Global("torch", "Size"), many),
        "a tensor for the arguments": Raw(b"cbuiltins\nset\n" + pickled(many)[2:-1] + b"R"),
        "a tensor for the arguments, by NEWOBJ": Raw(b"cbuiltins\nset\n" + pickled(many)[2:-1] + b"\x81"),
        "a stand-in with a method of the file": Call(
            rebuild, range_, range_, (1,), {"made": Global("builtins", "set")}
        ),
        "a parameter of no tensor": empty,
        "a parameter of a dict": Call(
            Global("torch._utils", "_rebuild_parameter"),
            Call(Global("collections", "OrderedDict"), state={"detach": Global("builtins", "set")}),
            False,
            Call(Global("collections", "OrderedDict")),
        ),
        "a tensor with a state": tensor_with_state((tensor(storage("0", 1), (1,), (1,)), 0, (10**9,), (1,))),
        "a tensor of a tensor": tensor(many, (1,), (1,)),
        "a sparse tensor of one index": Call(
            Global("torch._utils", "_rebuild_sparse_tensor"), layout, (indices, many, (5,), False)
        ),
        "a storage by a tensor": tensor(storage(tensor(storage("0", 1), (), ()), 1), (1,), (1,)),
        "a storage by a number": tensor(storage(0, 1), (1,), (1,)),
        "a method of a dict": _module(Call(Global("collections", "OrderedDict"), state=instead)),
        "a method of a module's dict": New(
            Global("torch.nn.modules.linear", "Identity"),
            state={"_parameters": Call(Global("collections", "OrderedDict"), state=instead)},
        ),
        "a rewritten stand-in": _module(Call(Global("upswap.surgery", "restore"), range_, None, state={"args": 1})),
    }


def with_attributes(state: Any) -> Call:
    """A tensor that torch gives the attributes in a state."""
    made = tensor(storage("0", 1), (1,), (1,))
    return Call(
        Global("torch._tensor", "_rebuild_from_type_v2"), made.function, Global("torch", "Tensor"), made.args, state
    )


def tensor_with_state(state: tuple[Any, ...]) -> Call:
    made = tensor(storage("0", 1), (1,), (1,))
    return Call(made.function, *made.args, state=state)


@pytest.mark.parametrize("name", list(_odd()))
def test_a_function_of_torchs_list_is_called_as_torch_save_has_it(name: str, tmp_path: Path) -> None:
    """Else some go through a tensor of one number for hours, read a record again and again, or put methods into stand-ins."""
    path = write_pt(tmp_path / "evil.pt", pickled([_odd()[name]]))
    memory, start = Peak(), time.process_time()
    with pytest.raises(UntrustedFileError):
        upswap.load(path)
    assert memory.megabytes() < 100
    assert time.process_time() - start < 5


def test_a_state_dict_whose_methods_are_data(tmp_path: Path) -> None:
    """Its items are read all the same."""
    weights = Call(Global("collections", "OrderedDict"), state={"items": 5, "keys": 5})
    item = b"X\x01\x00\x00\x00a" + pickled(tensor(storage("0", 1), (1,), (1,)))[2:-1] + b"s"
    with pytest.raises(SourceError, match="1 tensors"):
        upswap.load(write_pt(tmp_path / "weights.pt", b"\x80\x02" + pickled(weights)[2:-1] + item + b"."))


def _text(text: str) -> bytes:
    return b"X" + len(text.encode()).to_bytes(4, "little") + text.encode()


def _kept(value: bytes) -> bytes:
    """A model with a value, by its instructions, as an attribute."""
    return pickled(_module("@")).replace(_text("@") + b"q", value + b"q")


def _again() -> dict[str, bytes]:
    """Pickles in which one long text (`hP`) is used a thousand times."""
    long, latin = _text("a" * 10**6), _text("latin1") + b"\x86"
    calls = b"hPh\x51R" * 1000 + b"e"
    state = (1, (10**6,), Call(Global("numpy", "dtype"), "u1", False, True, state=(3, "|")), False, Raw(b"hP"))
    again = Call(Global("_codecs", "encode"), "b", "latin1")
    array = Call(Global("numpy._core.multiarray", "_reconstruct"), Global("numpy", "ndarray"), (0,), again, state=state)
    one = pickled(tensor(storage("0", 1), (1,), (1,)))[2:-1]
    weights = b"}" + _text("w") + one + b"sq\x51"
    child = b"ctorch.nn.modules.linear\nIdentity\n)\x81}" + _text("_parameters") + b"}hPh\x51ssb"
    children = b"}(" + b"".join(_text(str(number)) + child for number in range(1000)) + b"u"
    parent = b"ctorch.nn.modules.container\nSequential\n)\x81}" + _text("_modules") + children + b"sb"
    parts = b"}(" + b"".join(_text(str(number)) + b"h\x51" for number in range(1000)) + b"u"
    begin = b"\x80\x02}(" + _text("a") + long + b"qP" + _text("b")
    return {
        "bytes": _kept(b"](c_codecs\nencode\nqP" + long + latin + b"q\x51" + calls),
        "bytearrays": _kept(b"](cbuiltins\nbytearray\nqPc_codecs\nencode\n" + long + latin + b"R\x85q\x51" + calls),
        "arrays": _kept(b"](c_codecs\nencode\n" + long + latin + b"RqP" + pickled(array)[2:-1] * 1000 + b"e"),
        "patterns": _kept(b"](cre\n_compile\nqP" + _text("[\x01-\uffff]" * 90) + b"K\x02\x86q\x51" + calls),
        "keys above parts": begin + weights + b"hP" + parts + b"u.",
        "names of parameters": begin + one + b"q\x51" + _text("model") + parent + b"u.",
    }


@pytest.mark.parametrize("name", list(_again()))
def test_what_is_made_of_one_text_again_and_again(name: str, tmp_path: Path) -> None:
    path = write_pt(tmp_path / "model.pt", _again()[name])
    memory, start = Peak(), time.process_time()
    with pytest.raises(SourceError) as caught:
        upswap.load(path)
    assert memory.megabytes() < 200
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 10_000


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_one_text_a_thousand_times_in_the_place_of_any_other(every: int, tmp_path: Path) -> None:
    """No message, and no check, writes the whole of it: 5,000 times 200,000 characters."""
    seed = next(seed for seed in seeds() if seed.name == "graph.pt")
    kept = unpacked(seed.files[seed.load])
    name = next(name for name in kept if name.endswith("data.pkl"))
    texts = [(start, end) for kind, start, end in bounds_of(kept[name]) if kind == "BINUNICODE"]
    shared = b"(" + _text("a" * 200_000) + PUT + GET * 5000 + b"t"
    refused = 0
    for start, end in texts[::every]:
        changed = kept[name][:start] + shared + kept[name][end:]
        (tmp_path / "model.pt").write_bytes(packed({**kept, name: changed}))
        memory, said = Peak(), ""
        try:
            upswap.load(tmp_path / "model.pt")
        except UpswapError as error:
            said = str(error)
        assert len(said) < 10_000
        assert memory.megabytes() < 200
        refused += bool(said)
    assert refused > len(texts[::every]) / 2


def test_a_value_far_inside_is_told_shortly(tmp_path: Path) -> None:
    data = b"]" * 200_000 + b"cbuiltins\nlist\n" + b"a" * 200_000
    kept = pickled(_module("@"))
    start = time.process_time()
    with pytest.raises(UntrustedFileError, match=r"at x\[0\]\[0\].*\.\.\.\[0\]") as caught:
        upswap.load(write_pt(tmp_path / "deep.pt", kept.replace(b"X\x01\x00\x00\x00@q", data + b"q")))
    assert len(str(caught.value)) < 500
    assert time.process_time() - start < 15


@pytest.mark.parametrize("place", ["attribute", "buffer"])
def test_a_number_that_is_no_plain_one_is_counted_to_as_well(place: str, tmp_path: Path) -> None:
    model: Any = nn.LSTM(2, 2)
    model.__dict__["_all_weights"] = [[None]]
    del model.num_layers
    for number in (np.int64(10**12), np.array(10**12), torch.tensor(10**12), torch.tensor([10**12])):
        if place == "buffer" and isinstance(number, torch.Tensor):
            model.register_buffer("num_layers", number)
        else:
            model.__dict__["num_layers"] = number
        torch.save(model, tmp_path / "lstm.pt")
        start = time.process_time()
        with pytest.raises(UntrustedFileError, match="'num_layers' 1000000000000"):
            upswap.load(tmp_path / "lstm.pt")
        assert time.process_time() - start < 5
        model.__dict__.pop("num_layers", None)
        model._buffers.pop("num_layers", None)


@pytest.mark.filterwarnings("ignore:(Validating sparse|Sparse invariant|Sparse CSR)")  # torch says so
def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    """What torch.save writes of them is let through."""
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1))
    model[0].weight.note = ["x"]
    model.kept = nn.Buffer(torch.ones(2), persistent=False)
    model.tagged = torch.ones(2)
    model.tagged.tag = "x"
    for name, buffer in {
        "sparse": torch.eye(3).to_sparse(),
        "compressed": torch.eye(3).to_sparse_csr(),
        "diagonal": torch.sparse_coo_tensor(torch.arange(3).expand(2, 3), torch.ones(1).expand(3), (3, 3)),
        "expanded": torch.zeros(1).expand(5, 7),
        "large": torch.zeros(3, 1).expand(3, 10**6),
        "windows": torch.arange(100.0).unfold(0, 50, 1),
        "empty": torch.zeros(0, 3),
        "short": torch.zeros(3, dtype=torch.uint16),
        "conjugate": torch.ones(2, dtype=torch.complex64).conj(),
    }.items():
        model.register_buffer(name, buffer)
    model.values = [
        torch.Size([1, 2]),
        {1, 2},
        1j,
        b"\xff",
        b"\xff" * 50,
        OrderedDict(a=1),
        Counter("aab"),
        torch.empty(3, device="meta"),
    ]
    got: Any = upswap.load(upswap.save(model, tmp_path / "model.pt"))
    assert got[0].weight.note == ["x"]
    assert type(got.kept) is type(model.kept)
    assert (got.kept.persistent, got.tagged.tag) == (False, "x")
    assert torch.equal(got.windows, model.windows)
    assert got.large.shape == (3, 10**6)
    assert got.values[:-1] == model.values[:-1]
    assert torch.equal(got.sparse.to_dense(), torch.eye(3))
    assert torch.equal(got.compressed.to_dense(), torch.eye(3))
    assert torch.equal(got.diagonal.to_dense(), torch.eye(3))
    assert got.conjugate.is_conj()
    assert got.expanded.shape == (5, 7)
