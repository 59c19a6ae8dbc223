"""Many files through a loader in processes of their own, which may die or hang; and the table of what came of them."""

from __future__ import annotations

import collections
import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .guard import Outcome, Watch, limit_memory, watched
from .mutate import mutated
from .seeds import Seed, seeds, write

#: Seconds, also for each MiB of the files, after which a process that has said nothing is taken to hang; more than those of
#: `guard`, which are of processor time, on a busy machine.
HANGS, HANGS_EACH_MEBIBYTE = 60.0, 20.0

LOADER = "upswap:load"
LIBRARIES = ("monai.networks.nets", "timm", "torchvision", "transformers", "segmentation_models_pytorch", "numpy")


@dataclasses.dataclass(frozen=True)
class Case:
    """One changed file: its number, the seed it was made from, what was done to which file."""

    number: int
    seed: str
    mutation: str


@dataclasses.dataclass(frozen=True)
class Result:
    """A case and what came of it."""

    case: Case
    outcome: Outcome


def make(seed: int, number: int, all_seeds: Sequence[Seed]) -> tuple[Case, Seed, dict[str, bytes]]:
    """The changed file of that number: the same in every process and on every machine with the same libraries."""
    rng = random.Random(f"{seed}:{number}")
    chosen = rng.choice(all_seeds)
    name = rng.choice(list(chosen.files))
    other = rng.choice(list(rng.choice(all_seeds).files.values()))
    label, data = mutated(rng, name, chosen.files[name], other)
    return Case(number, chosen.name, label), chosen, {**chosen.files, name: data}


def _loader(name: str) -> Callable[[Path], Any]:
    module, _, function = name.partition(":")
    found: Callable[[Path], Any] = getattr(importlib.import_module(module), function)
    return found


def _work(pipe: Connection, seed: int, originals: Sequence[Seed], loader: str, folder: str) -> None:
    """Load the files whose numbers come through the pipe."""
    load = _loader(loader)
    watch = Watch()
    os.environ["MPLCONFIGDIR"] = folder
    with tempfile.TemporaryDirectory(dir=folder) as name:
        # What importing the libraries does, and what a load imports and holds for good, is not counted.
        for library in LIBRARIES if loader == LOADER else ():
            importlib.import_module(library)
        for original in originals if loader == LOADER else ():
            _emptied(Path(name))
            if original.load != "weights.pt":
                load(write(original, original.files, Path(name)))
        limit_memory(8000)
        pipe.send("ready")
        while (number := pipe.recv()) is not None:
            _emptied(Path(name))
            case, chosen, files = make(seed, number, originals)
            pipe.send(sum(map(len, files.values())) / 2**20)
            pipe.send((case, watched(load, write(chosen, files, Path(name)), watch)))


def _emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


class _Worker:
    """A process that loads one file after another, replaced by a new one when it dies or hangs."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        self.process.start()
        theirs.close()
        self.number: int | None = None
        self.since, self.mebibytes = time.monotonic(), 0.0
        self.ready = False

    def give(self, number: int) -> None:
        self.pipe.send(number)
        self.number, self.since, self.mebibytes = number, time.monotonic(), 0.0

    def poll(self, hangs: float) -> Result | None:
        """What came of the file given last, None where it is still being loaded."""
        try:
            if self.pipe.poll():
                found = self.pipe.recv()
                if found == "ready":
                    self.ready = True
                    return None
                if isinstance(found, float):
                    self.mebibytes = found
                    return None
                self.number = None
                return Result(*found)
        except EOFError:
            self.process.join()
            return self._lost("died", f"the process died: exit code {self.process.exitcode}")
        hangs += HANGS_EACH_MEBIBYTE * self.mebibytes
        if self.number is not None and time.monotonic() - self.since > hangs:
            return self._lost("hung", f"no end after {hangs:.0f} s")
        return None

    def _lost(self, ended: str, wrong: str) -> Result:
        number, seconds = self.number, time.monotonic() - self.since
        if number is None:
            raise RuntimeError(f"a process of the fuzz could not be started: {wrong}")
        self.stop()
        self._start()
        case, _, _ = make(*self._arguments[:1], number, self._arguments[1])
        return Result(case, Outcome(ended, wrong, seconds, 0.0))

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def run(
    numbers: list[int], seed: int = 0, jobs: int = 1, loader: str = LOADER, hangs: float = HANGS
) -> Iterator[Result]:
    """Load the files of these numbers, in some order."""
    with tempfile.TemporaryDirectory(prefix="upswap-fuzz-") as folder:
        workers = [_Worker(seed, seeds(), loader, folder) for _ in range(min(jobs, len(numbers)))]
        queue, left = list(reversed(numbers)), len(numbers)
        try:
            while left:
                for worker in workers:
                    result = worker.poll(hangs)
                    if result is not None:
                        left -= 1
                        yield result
                    if worker.ready and worker.number is None and queue:
                        worker.give(queue.pop())
                multiprocessing.connection.wait([worker.pipe for worker in workers], timeout=0.5)
        finally:
            for worker in workers:
                worker.stop()


def keep(result: Result, seed: int, folder: Path) -> Path:
    """Put a file that something was wrong with aside, with what it was; the path is for `--replay`."""
    case, chosen, files = make(seed, result.case.number, seeds())
    place = folder / f"{seed}-{case.number}"
    shutil.rmtree(place, ignore_errors=True)
    (place / "files").mkdir(parents=True)
    write(chosen, files, place / "files")
    about = {**dataclasses.asdict(case), **dataclasses.asdict(result.outcome), "load": chosen.load}
    (place / "about.json").write_text(json.dumps(about, indent=2))
    return place


def report(results: list[Result], seconds: float, console: Console) -> None:
    """How loads ended by what was done to the files; the slowest, the hungriest, and all that was wrong."""
    ends = [end for end, _ in collections.Counter(result.outcome.ended for result in results).most_common()]
    counts = collections.Counter((result.case.mutation, result.outcome.ended) for result in results)
    table = Table(title=f"{len(results)} files in {seconds:.0f} s")
    table.add_column("change")
    for end in (*ends, "all"):
        table.add_column(end, justify="right")
    for mutation in sorted({result.case.mutation for result in results}):
        row = [counts[mutation, end] for end in ends]
        table.add_row(mutation, *(str(count or "") for count in row), str(sum(row)))
    totals = [sum(counts[key] for key in counts if key[1] == end) for end in ends]
    table.add_section()
    table.add_row("all", *map(str, totals), str(len(results)))
    console.print(table)
    by_seed = collections.Counter((result.case.seed, result.outcome.ended == "loaded") for result in results)
    for name in sorted({result.case.seed for result in results}):
        console.print(f"{name}: {by_seed[name, True]} of {by_seed[name, True] + by_seed[name, False]} loaded")
    slowest = max(results, key=lambda result: result.outcome.seconds)
    hungriest = max(results, key=lambda result: result.outcome.megabytes)
    console.print(f"slowest: {slowest.outcome.seconds:.2f} s, {slowest.case}")
    console.print(f"most memory: {hungriest.outcome.megabytes:.0f} MB more than before, {hungriest.case}")
    wrong = [result for result in results if result.outcome.wrong]
    for result in wrong[:40]:
        console.print(f"[red]wrong[/red] {result.case}: {result.outcome.wrong}", soft_wrap=True, highlight=False)
    console.print(f"{len(wrong)} of {len(results)} wrong")
