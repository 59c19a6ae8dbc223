"""The same run on an engine for clusters, a worker killed midway: nothing is lost, and nothing finished is done twice."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from zoo_runs import built, descendants, listing, rows, start, until

pytestmark = pytest.mark.timeout(400)

NAMES = tuple(f"make?name=m{index}&seconds=1" for index in range(6))


def finish(process: subprocess.Popen[str], folder: Path) -> None:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert "6 models: 6 converted" in out
    assert set(rows(folder / "out")) == set(NAMES)
    lines = (folder / "out" / "journal.jsonl").read_text().splitlines()
    assert len(lines) == 2 + len(NAMES)  # the settings, and the names of the files
    assert len(list((folder / "out").glob("*.pt"))) == len(NAMES)


def is_nursery(process: psutil.Process) -> bool:
    try:
        return "upswap.apps.zoo.nursery" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def kill_a_worker(process: subprocess.Popen[str], folder: Path, root: int, *, from_below: bool = False) -> set[str]:
    """Kill the worker that has a model in work, once two are done; the names that were done by then.

    `from_below`, what it started is killed first, in the order and with the pauses of a busy machine.
    """
    until(lambda: len(rows(folder / "out")) >= 2)

    def lineage() -> list[psutil.Process]:
        """The process of a model, the nursery that forked it, and their worker; none where no model is in work."""
        for nursery in filter(is_nursery, psutil.Process(root).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                if models := nursery.children():
                    return [*models, nursery, nursery.parent()]
        return []

    # Found and killed in one go: a moment later the model may be done, and its worker between two of them.
    found = until(lineage)
    *below, victim = found
    assert victim.pid not in (process.pid, root)
    done = set(rows(folder / "out"))
    for each in below if from_below else []:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
        time.sleep(0.3)
    victim.kill()
    return {name.partition("name=")[2].partition("&")[0] for name in done}


def check_work(folder: Path, done: set[str]) -> None:
    """Every model was built once; one more time at most for those that were in work when the worker was killed."""
    counts = Counter(built(folder))
    assert set(counts) == {f"m{index}" for index in range(6)}
    assert all(counts[name] == 1 for name in done)
    assert sum(counts.values()) <= 6 + 2


@pytest.mark.parametrize("from_below", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_worker_of_this_machine_is_killed(from_below: bool, place: Path) -> None:
    """`from_below` is how joblib ends the workers that are left when one is lost, and all of them on Ctrl-C."""
    process = start(place, "list", listing(place, *NAMES), "-o", "out", "--jobs", "2")
    done = kill_a_worker(process, place, process.pid, from_below=from_below)
    finish(process, place)
    check_work(place, done)


@contextlib.contextmanager
def dask_cluster(place: Path, workers: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process that keeps the workers, of one thread each, and the address. The workers may still be coming."""
    pytest.importorskip("distributed")
    options = ["--no-dashboard", "--scheduler-file", "s"]
    scheduler = subprocess.Popen(
        [sys.executable, "-m", "distributed.cli.dask_scheduler", "--port", "0", *options],
        stderr=subprocess.DEVNULL,
        cwd=place,
    )
    worker = None
    options += ["--nworkers", str(workers), "--nthreads", "1", "--local-directory", "scratch"]
    try:
        until(lambda: (place / "s").exists() and (place / "s").stat().st_size > 0)
        worker = subprocess.Popen(
            [sys.executable, "-m", "distributed.cli.dask_worker", *options],
            stderr=subprocess.DEVNULL,
            cwd=place,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), str(place)])},
        )
        yield worker, json.loads((place / "s").read_text())["address"]
    finally:
        for each in (worker, scheduler):
            if each is not None:
                each.terminate()
                each.wait(30)


def test_dask(place: Path) -> None:
    with dask_cluster(place, 2) as (worker, address):
        process = start(
            place, "list", listing(place, *NAMES), "-o", "out", "--jobs", "2", "--backend", "dask", "--address", address
        )
        done = kill_a_worker(process, place, worker.pid)
        finish(process, place)
        check_work(place, done)


@pytest.mark.slow
def test_a_dask_cluster_with_room_for_one_model_does_the_work(place: Path) -> None:
    """So has one whose workers are still coming. Left to itself, joblib would do the models in the process that asked."""
    with dask_cluster(place, 1) as (worker, address):
        process = start(place, "list", listing(place, NAMES[0]), "-o", "out", "--backend", "dask", "--address", address)
        until(lambda: [p for p in psutil.Process(worker.pid).children(recursive=True) if is_nursery(p)])
        assert not [p for p in descendants(process) if is_nursery(p)]
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert "1 models: 1 converted" in out


@pytest.mark.slow
@pytest.mark.parametrize("authentication", ["disabled", "token"])
def test_ray(authentication: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = tuple(map(int, pytest.importorskip("ray").__version__.split(".")[:2]))
    if authentication == "token" and release < (2, 52):
        pytest.skip(f"ray has tokens from 2.52 on; this is {release[0]}.{release[1]}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[3]), str(place)]))
    # Said in both cases: left open, a `~/.ray/auth_token` on this machine decides for the cluster, but not for who joins it.
    monkeypatch.setenv("RAY_AUTH_MODE", authentication)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets lie in it, whose paths must be short
    options = ["--temp-dir", scratch, "--num-cpus", "2", "--include-dashboard", "false"]
    options += ["--object-store-memory", "100000000"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(place / "head", "w") as log:
        head = subprocess.Popen(
            [*ray, "start", "--head", "--block", "--port", str(port), *options], stdout=log, stderr=log, cwd=place
        )
    address = f"127.0.0.1:{port}"
    on_ray = ["--backend", "ray", "--address", address]

    def there() -> bool:
        assert head.poll() is None, (place / "head").read_text()
        asked = subprocess.run([*ray, "status", "--address", address], capture_output=True, check=False, text=True)
        assert "AuthenticationError" not in asked.stderr, asked.stderr
        return asked.returncode == 0

    try:
        until(there)
        models = listing(place, *NAMES)
        refused = None
        if authentication == "token":
            monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
            refused = start(place, "list", models, "-o", "refused", *on_ray)
            monkeypatch.setenv("RAY_AUTH_MODE", authentication)
        process = start(place, "list", models, "-o", "out", "--jobs", "2", *on_ray)
        done = kill_a_worker(process, place, head.pid)
        finish(process, place)
        check_work(place, done)
        if refused is not None:
            _, err = refused.communicate(timeout=60)
            assert refused.returncode == 2
            assert f"there is no connection to Ray at {address}" in err
            assert "RAY_AUTH_MODE=token has to be set" in err
    finally:
        children = psutil.Process(head.pid).children(recursive=True)
        head.terminate()
        head.wait(60)
        for child in children:
            if child.is_running():
                child.kill()
        psutil.wait_procs(children, timeout=10)
        shutil.rmtree(scratch, ignore_errors=True)


def listening(root: psutil.Process) -> set[str]:
    """The addresses that the processes of a tree wait on, for a connection or a datagram."""
    found = set()
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            for line in process.net_connections("inet"):
                if line.status == psutil.CONN_LISTEN or (line.type == socket.SOCK_DGRAM and not line.raddr):
                    found.add(line.laddr.ip)
    return found


@pytest.mark.parametrize(
    "backend", ["local", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ray", "dask"))]
)
def test_what_is_started_here_is_reached_from_here_alone(
    backend: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not told of a cluster, a run joins none, though the environment names one."""
    if backend != "local":
        pytest.importorskip("distributed" if backend == "dask" else "ray")
    scratch = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    for name, value in {
        "HOME": str(place),  # Ray leaves a token in it
        "RAY_TMPDIR": scratch,
        "RAY_ADDRESS": "192.0.2.1:6379",
        "DASK_SCHEDULER_ADDRESS": "tcp://192.0.2.1:8786",
    }.items():
        monkeypatch.setenv(name, value)
    models = listing(place, "make?name=m0&seconds=6", "make?name=m1&seconds=6")
    process = start(place, "list", models, "-o", "out", "--jobs", "2", "--backend", backend)
    try:
        until(lambda: len(built(place)) == 2 or process.poll() is not None)
        found = listening(psutil.Process(process.pid))
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
        assert "2 models: 2 converted" in out
        assert {ip for ip in found if not ipaddress.ip_address(ip.removeprefix("::ffff:")).is_loopback} == set()
        assert bool(found) == (backend != "local")
    finally:
        for each in descendants(process) if process.poll() is None else []:
            each.kill()
        shutil.rmtree(scratch, ignore_errors=True)
