"""The same run on an engine for clusters, a worker killed midway: nothing is lost, and nothing finished is done twice."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from zoo_runs import built, listing, rows, start, until

pytestmark = pytest.mark.timeout(400)

NAMES = tuple(f"make?name=m{index}&seconds=1" for index in range(6))


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "6 models: 6 converted" in out
    assert set(rows(folder / "out")) == set(NAMES)
    lines = (folder / "out" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(NAMES)
    assert len(list((folder / "out").glob("*.pt"))) == len(NAMES)


def kill_a_worker(process: subprocess.Popen[str], folder: Path, root: int) -> set[str]:
    """Kill the worker that has a model in work, once two are done; the names that were done by then."""
    until(lambda: len(rows(folder / "out")) >= 2)

    def busy() -> psutil.Process | None:
        for each in psutil.Process(root).children(recursive=True):
            try:
                if "upswap.apps.zoo.nursery" in " ".join(each.cmdline()) and each.children():
                    return each.parent()
            except psutil.NoSuchProcess:
                continue
        return None

    until(lambda: busy() is not None)
    victim = busy()
    assert victim is not None
    assert victim.pid not in (process.pid, root)
    done = set(rows(folder / "out"))
    victim.kill()
    return {name.partition("name=")[2].partition("&")[0] for name in done}


def check_work(folder: Path, done: set[str]) -> None:
    """Every model was built once; one more time at most for those that were in work when the worker was killed."""
    counts = Counter(built(folder))
    assert set(counts) == {f"m{index}" for index in range(6)}
    assert all(counts[name] == 1 for name in done)
    assert sum(counts.values()) <= 6 + 2


def test_a_worker_of_this_machine_is_killed(place: Path) -> None:
    process = start(place, "list", listing(place, *NAMES), "-o", "out", "--jobs", "2")
    done = kill_a_worker(process, place, process.pid)
    finish(process, place)
    check_work(place, done)


def test_dask(place: Path) -> None:
    pytest.importorskip("distributed")
    scheduler = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "distributed.cli.dask_scheduler",
            "--port",
            "0",
            "--no-dashboard",
            "--scheduler-file",
            "s",
        ],
        stderr=subprocess.DEVNULL,
        cwd=place,
    )
    worker = None
    options = ["--nthreads", "1", "--no-dashboard", "--local-directory", "scratch"]
    try:
        until(lambda: (place / "s").exists() and (place / "s").stat().st_size > 0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", "s", "--nworkers", "2", *options],
            stderr=subprocess.DEVNULL,
            cwd=place,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(place)])},
        )
        import json

        address = json.loads((place / "s").read_text())["address"]
        process = start(
            place, "list", listing(place, *NAMES), "-o", "out", "--jobs", "2", "--backend", "dask", "--address", address
        )
        done = kill_a_worker(process, place, worker.pid)
        finish(process, place)
        check_work(place, done)
    finally:
        for each in (worker, scheduler):
            if each is not None:
                each.terminate()
                each.wait(30)


def test_ray(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), str(place)]))
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    options = ["--temp-dir", f"/tmp/ray-{os.getpid()}", "--num-cpus", "2", "--include-dashboard", "false"]
    options += ["--object-store-memory", "100000000"]
    port = 20000 + os.getpid() % 20000
    head = subprocess.Popen(
        [*ray, "start", "--head", "--block", "--port", str(port), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=place,
    )
    try:
        address = f"127.0.0.1:{port}"
        until(
            lambda: (
                subprocess.run([*ray, "status", "--address", address], capture_output=True, check=False).returncode == 0
            )
        )
        process = start(
            place, "list", listing(place, *NAMES), "-o", "out", "--jobs", "2", "--backend", "ray", "--address", address
        )
        done = kill_a_worker(process, place, head.pid)
        finish(process, place)
        check_work(place, done)
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        for child in children:
            if child.is_running():
                child.kill()
        time.sleep(0.1)
