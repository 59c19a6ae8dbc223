"""What `upswap zoo` costs beside building the same models alone: the floor, since every model has to be built.

    python benchmarks/zoo_speed.py [--arch '*'] [--encoder GLOBS] [--jobs 2] [--format plan|pt] [--json]

By default all architectures of SMP on twenty encoders. Each architecture is run twice in turn through the same engine, with
the same number of workers and a process for every model: once to build the models only, once to convert them. Reported are
models per minute, the ratio of the two wall times, of the time inside the processes, and the memory of a worker and of its
largest model. The bound on import time is that each worker imports once: the engine's own start is timed with both.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import click
import psutil

from upswap.apps.zoo import catalog
from upswap.apps.zoo.engine import run
from upswap.apps.zoo.journal import Journal
from upswap.apps.zoo.rows import FORMATS, Row, Settings, Task

ENCODERS = (
    "resnet18,resnet34,resnet50,resnet101,resnext50_32x4d,densenet121,efficientnet-b0,efficientnet-b3,mobilenet_v2,"
    "mit_b0,mit_b2,vgg13,vgg16_bn,dpn68,mobileone_s0,timm-skresnet18,tu-convnext_atto,tu-convnext_tiny,"
    "tu-resnetv2_50,tu-mobilenetv3_small_100"
)
OPTIONS = {
    "style": "lp",
    "groups": None,
    "dyscope": False,
    "init": "match",
    "cascade": False,
    "strict": False,
    "kinds": ("feature",),
    "include": (),
    "exclude": (),
}


def wall(sources: list[str], folder: Path, settings: Settings, jobs: int) -> tuple[float, list[Row], float]:
    """Seconds of a run over `sources`, its rows, and the largest resident memory of a worker's nursery in bytes."""
    folder.mkdir()
    journal = Journal(folder)
    suffix = FORMATS[settings.output or "plan"]
    targets = journal.start(settings, lambda claimed: catalog.targets(sources, folder, suffix, claimed))
    tasks = [Task(source, str(target), settings, os.getcwd()) for source, target in targets.items()]
    peak = [0.0]
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            for process in psutil.Process().children(recursive=True):
                try:
                    if _nursery(process) and not _nursery(process.parent()):  # its forks look like it
                        peak[0] = max(peak[0], process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    before = time.perf_counter()
    run(tasks, folder, jobs=jobs)
    seconds = time.perf_counter() - before
    ended.set()
    thread.join()
    return seconds, list(journal.rows().values()), peak[0]


def growth(rows: list[Row]) -> dict[str, float]:
    """The powers of a model's parameters that seconds beside building it, and its process's memory, grow with."""
    if len({row.parameters for row in rows}) < 2:
        return {}
    sizes = [math.log(row.parameters) for row in rows]
    powers = {
        "seconds grow with parameters to the": [math.log(row.total_seconds - row.seconds["build"]) for row in rows],
        "peak memory grows with parameters to the": [math.log(row.peak_memory) for row in rows],
    }
    return {name: round(statistics.linear_regression(sizes, values).slope, 2) for name, values in powers.items()}


def _nursery(process: psutil.Process | None) -> bool:
    return process is not None and "upswap.apps.zoo.nursery" in " ".join(process.cmdline())


@click.command()
@click.option("--arch", default="*")
@click.option("--encoder", default=ENCODERS)
@click.option("--jobs", default=2)
@click.option("--format", "output", type=click.Choice(list(FORMATS)), default="plan")
@click.option("--json", "as_json", is_flag=True)
def main(arch: str, encoder: str, jobs: int, output: str, as_json: bool) -> None:
    """Time both runs, architecture by architecture, and print a table."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    full = Settings(OPTIONS, output=output, threads=threads)
    floor = Settings(OPTIONS, output=None, build_only=True, threads=threads)
    table: list[dict[str, Any]] = []
    converted: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        groups: dict[str, list[str]] = {}
        for source in catalog.smp(arch, encoder, {}):
            groups.setdefault(source.partition("?")[0].removeprefix("smp:"), []).append(source)
        for name, sources in groups.items():
            alone, built, _ = wall(sources, Path(temporary, f"{name}-floor"), floor, jobs)
            seconds, rows, memory = wall(sources, Path(temporary, name), full, jobs)
            good = [row for row in rows if row.status == "converted"]
            converted += good
            table.append(
                {
                    "architecture": name,
                    "models": len(rows),
                    "converted": len(good),
                    "not built": sum(row.status == "cannot be built" for row in rows),
                    "failed": sum(row.status == "failed" for row in rows),
                    "floor s": round(alone, 1),
                    "zoo s": round(seconds, 1),
                    "ratio": round(seconds / alone, 2),
                    "inside": round(
                        sum(row.total_seconds for row in rows) / max(1e-9, sum(row.total_seconds for row in built)), 2
                    ),
                    "models/min": round(len(rows) / seconds * 60, 1),
                    "worker MB": round(memory / 1e6),
                    "largest model MB": round(max(row.peak_memory for row in rows) / 1e6),
                    "median s": round(statistics.median(row.total_seconds for row in good), 2) if good else None,
                }
            )
            print(json.dumps(table[-1]), file=sys.stderr, flush=True)
    total = {"models": sum(row["models"] for row in table), "zoo s": sum(row["zoo s"] for row in table)}
    floor_seconds = sum(row["floor s"] for row in table)
    summary = {
        **total,
        "floor s": floor_seconds,
        "ratio": round(total["zoo s"] / floor_seconds, 2),
        **growth(converted),
    }
    if as_json:
        print(json.dumps({"rows": table, "total": summary}, indent=2))
        return
    names = list(table[0])
    print(" ".join(f"{name:>16}" for name in names))
    for row in table:
        print(" ".join(f"{row[name]!s:>16}" for name in names))
    print(f"\n{summary}")


if __name__ == "__main__":
    main()
