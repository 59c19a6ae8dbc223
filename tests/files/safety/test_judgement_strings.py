"""Every string of a file is given a hostile value, one at a time: of the module tree, of the plan, of records and headers.

What loads is also run. Python's audit events say whether any of it became code.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import upswap

#: Code, wherever a name could end up: in quotes of a call, on a line of its own for whatever ends a line, in an expression.
PAYLOADS = (
    'training") or open({mark!r}, "w") or getattr(self, "x',
    "training') or open({mark!r}, 'w') or getattr(self, 'x",
    'training")\n    open({mark!r}, "w")\n    getattr(self, "x',
    'training")\r    open({mark!r}, "w")\r    getattr(self, "x',
    "x\u2028\x0b\x0c\x85open({mark!r}, 'w')",
    "open({mark!r}, 'w')",
    "{{open({mark!r}, 'w')}}",
)

RUN = """
    import copy, itertools, json, pickletools, struct, sys, warnings
    from collections import Counter, OrderedDict
    from pathlib import Path
    sys.path[:0] = {paths!r}
    import numpy, segmentation_models_pytorch, timm, torch, torchvision, upswap
    from fuzz.guard import Watch, watched
    from fuzz.mutate import _joined, _parts, packed, unpacked
    from fuzz.seeds import seeds, write

    warnings.simplefilter("ignore")
    payloads = itertools.cycle({payloads!r})
    folder, mark = Path({folder!r}), Path({mark!r})
    pyramid = [torch.zeros(1, *shape) for shape in ((3, 64, 64), (24, 32, 32), (32, 16, 16), (64, 8, 8))]
    inputs = {{
        "module.pt": torch.zeros(1, 3, 16, 16),
        "source.pt": OrderedDict(a=torch.zeros(1, 4, 16, 16), b=torch.zeros(1, 8, 8, 8)),
        "graph.pt": pyramid,
        "plan.safetensors": pyramid,
    }}

    def in_json(value):
        # Copies of a value, each with another string in it replaced.
        if isinstance(value, str):
            yield next(payloads)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                for changed in in_json(item):
                    yield [*value[:index], changed, *value[index + 1 :]]
        elif isinstance(value, dict):
            for key, item in value.items():
                yield {{(next(payloads) if name == key else name): other for name, other in value.items()}}
                for changed in in_json(item):
                    yield {{**value, key: changed}}

    def in_pickle(data):
        found = [(code.name, argument, at) for code, argument, at in pickletools.genops(data)]
        ends = [at for _, _, at in found[1:]] + [len(data)]
        for (name, text, start), end in zip(found, ends):
            if name == "BINUNICODE":
                plans = map(json.dumps, in_json(json.loads(text))) if text.startswith("{{") else ()
                for new in [next(payloads).encode(), *(plan.encode() for plan in plans)]:
                    yield data[:start] + b"X" + struct.pack("<I", len(new)) + new + data[end:]

    def changed(name, data):
        if name.endswith(".pt"):
            records = unpacked(data)
            place = next(place for place in records if place.endswith("data.pkl"))
            return (packed({{**records, place: new}}) for new in in_pickle(records[place]))
        header, rest = _parts(data)
        new = (json.dumps(about) for about in in_json(json.loads(header["__metadata__"]["upswap"])))
        return (_joined({{**header, "__metadata__": {{"upswap": about}}}}, rest) for about in new)

    def aliased(payload):
        # The graph route's file with another name for a child, which tracers find first, and which the record knows.
        model = copy.deepcopy(patched)
        for module in model.modules():
            record = vars(type(module)).get("_upswap_record")
            if record is not None and record.forward is not None:
                first = record.forward["children"][0]
                parts = vars(module)["_modules"]
                vars(module)["_modules"] = OrderedDict([(payload, parts[first["path"]]), *parts.items()])
                first["path"] = payload
        torch.save(model, folder / "aliased.pt")
        return (folder / "aliased.pt").read_bytes()

    def load(path):
        model = upswap.load(path, copy.deepcopy(original) if path.suffix == ".safetensors" else None)
        try:
            model(inputs[path.name])
        except (SyntaxError, NameError):
            raise
        except Exception:
            pass  # it may be no model that runs
        return model

    found = {{seed.name: seed.files[seed.name] for seed in seeds() if seed.name in inputs}}
    (folder / "graph.pt").write_bytes(found["graph.pt"])
    patched = upswap.load(folder / "graph.pt")
    routes = {{site.route for site in upswap.plan_of(patched).swapped}}
    original = upswap.unpatch(copy.deepcopy(patched))
    found["plan.safetensors"] = upswap.save(patched, folder / "plan.safetensors").read_bytes()
    watch, ends = Watch(), {{}}
    for name, data in found.items():
        path = folder / name
        more = map(aliased, {payloads!r}) if name == "graph.pt" else ()
        for number, new in enumerate(itertools.chain([data], more, changed(name, data))):
            if number > 6 and number % {every}:
                continue
            path.write_bytes(new)
            outcome = watched(load, path, watch)
            ends.setdefault(name, Counter())[outcome.ended] += 1
            assert not watch.seen and not mark.exists(), (name, outcome)
            assert outcome.ended not in ("SyntaxError", "NameError"), (name, outcome)
    print(json.dumps([sorted(routes), ends]))
    """


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_no_string_of_a_file_becomes_code(every: int, tmp_path: Path) -> None:
    """Each string is replaced, one at a time; in the quick set each third one, which meets all payloads."""
    tests, mark = Path(__file__).parents[2], tmp_path / "ran"
    folder = tmp_path / "files"
    folder.mkdir()
    paths = [str(tests), str(tests / "support"), str(Path(upswap.__file__).parents[1])]
    payloads = [payload.format(mark=str(mark)) for payload in PAYLOADS]
    code = textwrap.dedent(RUN.format(paths=paths, payloads=payloads, folder=str(folder), mark=str(mark), every=every))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-5000:]
    routes, ends = json.loads(ran.stdout.splitlines()[-1])
    assert routes == ["graph", "source"]
    for name, most in {"module.pt": 100, "source.pt": 150, "graph.pt": 300, "plan.safetensors": 200}.items():
        assert ends[name]["loaded"] >= 1
        assert sum(ends[name].values()) > most / every
