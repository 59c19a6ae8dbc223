"""A short slice of the fuzz, and that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import upswap
from fuzz import bad_loaders, mutate
from fuzz.mutate import BYTES, JSON, PT, SAFETENSORS, counted, edited, mutations_for
from fuzz.runner import keep, make, run
from fuzz.seeds import seeds

EACH = """
    import json, sys
    from pathlib import Path
    sys.path[:0] = {paths!r}
    from fuzz import bad_loaders
    from fuzz.guard import Watch, limit_memory, watched

    watch, found = Watch(), {{}}
    limit_memory(8000)
    for load in bad_loaders.SEEN:
        Path("model.pt").write_bytes(b"x")
        found[load.__name__] = watched(load, Path("model.pt").absolute(), watch).wrong
    print(json.dumps(found))
    """


def test_a_slice_of_the_fuzz() -> None:
    results = list(run(list(range(80)), seed=12345, jobs=1))
    assert sorted(result.case.number for result in results) == list(range(80))
    wrong = [result for result in results if result.outcome.wrong]
    assert not wrong, "\n".join(map(str, wrong))
    assert {"loaded", "SourceError", "UntrustedFileError"} <= {result.outcome.ended for result in results}


def test_what_a_load_may_not_do_is_seen(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parents[1]), str(Path(upswap.__file__).parents[1])]
    code = textwrap.dedent(EACH.format(paths=paths))
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    for load, says in bad_loaders.SEEN.items():
        wrong = found[load.__name__]
        assert (says in wrong) if says else not wrong, (load.__name__, wrong)


@pytest.mark.parametrize(("loader", "ended"), [pytest.param("hangs", "hung", marks=pytest.mark.slow), ("dies", "died")])
def test_a_process_that_hangs_or_dies_is_one_result_and_not_the_end(loader: str, ended: str, tmp_path: Path) -> None:
    results = list(run([0, 1], loader=f"fuzz.bad_loaders:{loader}", hangs=3))
    assert [result.outcome.ended for result in results] == [ended, ended]
    place = keep(results[0], 0, tmp_path)
    about = json.loads((place / "about.json").read_text())
    assert about["ended"] == ended
    assert about["wrong"]
    assert (place / "files" / about["load"]).exists()


def test_every_change_is_made_and_every_file_can_be_made_again() -> None:
    """Each mutation of each kind of file gives another file than it was given, mostly; and the number decides which."""
    done = set()
    for number in range(600):
        case, seed, files = make(0, number, seeds())
        if number % 10 == 0:
            assert make(0, number, seeds()) == (case, seed, files)
        if files != seed.files:
            done.add(case.mutation)
    assert done == set(BYTES) | set(PT) | set(SAFETENSORS) | set(JSON)
    for seed in seeds():
        assert all(mutations_for(name) for name in seed.files)


@pytest.mark.parametrize("change", [edited, counted])
def test_a_value_that_has_grown_is_not_changed_once_more(change: Callable[[Random, Any], Any]) -> None:
    """A list that is made longer may hold one that was: a run of the fuzz once took all memory by that."""
    grown = [1] * (mutate._MOST_ENTRIES + 1)
    for seed in range(20):
        assert change(Random(seed), list(grown)) == grown
    assert any(change(Random(seed), grown[:100]) != grown[:100] for seed in range(20))


def test_the_seeds_load_by_every_route(tmp_path: Path) -> None:
    """Files that were refused to begin with would make for an easy run."""
    routes = set()
    for seed in seeds():
        for name, data in seed.files.items():
            (tmp_path / name).write_bytes(data)
        if seed.name == "weights.pt":
            continue
        model = upswap.load(tmp_path / seed.load)
        routes |= {site.route for site in upswap.plan_of(model).swapped}
        for name in seed.files:
            (tmp_path / name).unlink()
    assert routes == {"module", "graph", "source"}
