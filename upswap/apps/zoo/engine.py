"""Tasks to workers, through joblib: processes of this machine, or a cluster of Ray or Dask.

A worker that is lost takes nothing with it but the model it was at: what the journal does not have is handed out again.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import OptionError, UpswapError
from .journal import Journal
from .nursery import Nursery, worker_name
from .rows import Row, Task

#: How often in a row workers may be lost without a single model being done.
_PATIENCE = 3

_LOOPBACK = "127.0.0.1"

#: Where it is off, as Ray reads when it is imported, Ray takes the loopback address for the node's, and listens on it alone.
#: Otherwise it puts another in the place of the one that it is given.
_RAY_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def run(tasks: Sequence[Task], folder: Path, *, jobs: int, backend: str = "local", address: str | None = None) -> None:
    """Do the tasks; their rows are in the journal in `folder` afterwards.

    `jobs` is the number of workers, -1 for as many as the machine or the cluster has.

    Raises:
        OptionError: the backend's package is not installed, or there is no cluster at `address`.
        UpswapError: workers were lost again and again.
    """
    import joblib

    journal = Journal(folder)
    fruitless = 0
    owner = (socket.gethostname(), os.getpid())
    with _cluster(backend, address, jobs) as parameters, contextlib.closing(_nursery):
        while left := [task for task in tasks if task.source not in journal.rows()]:
            count = len(left)
            try:
                with joblib.parallel_config(**parameters):
                    joblib.Parallel(n_jobs=jobs, batch_size=1, pre_dispatch="n_jobs")(
                        joblib.delayed(work)(task, str(folder), owner) for task in left
                    )
            except Exception as error:  # each engine has its own name for a worker that died
                done = count - sum(task.source not in journal.rows() for task in left)
                fruitless = 0 if done else fruitless + 1
                if fruitless == _PATIENCE:
                    first = str(error).strip().splitlines()[:1] or [type(error).__name__]
                    raise UpswapError(
                        f"the workers were lost {_PATIENCE} times without a model being done: {first[0]}"
                    ) from error


def work(task: Task, folder: str, owner: tuple[str, int]) -> None:
    """One task, in a worker: done in a child process and written down, unless it has been already."""
    journal = _journals.setdefault(folder, Journal(Path(folder)))
    if task.source in journal.rows() or _gone(owner):
        return
    row = _nursery.run(task)
    row.worker = row.worker or worker_name()
    if not _gone(owner):
        journal.append(row)


class _ThreadsNursery(threading.local):
    """A nursery for each thread of a worker (Dask's have several), since one does one task at a time."""

    nursery: Nursery | None = None

    def run(self, task: Task) -> Row:
        if self.nursery is None or not self.nursery.alive:
            self.nursery = Nursery(task.settings.threads)
            atexit.register(self.nursery.close)
        return self.nursery.run(task)

    def close(self) -> None:
        if self.nursery is not None:
            atexit.unregister(self.nursery.close)
            self.nursery.close()
            self.nursery = None


_nursery = _ThreadsNursery()
_journals: dict[str, Journal] = {}


def _gone(owner: tuple[str, int]) -> bool:
    """Whether the process that started the run is no more; on another machine it cannot be told."""
    host, pid = owner
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextlib.contextmanager
def _cluster(backend: str, address: str | None, jobs: int) -> Iterator[dict[str, Any]]:
    """What `joblib.parallel_config` takes for a backend, connected while inside."""
    if backend == "local":
        if address is not None:
            raise OptionError("--address is for --backend ray or dask")
        yield {"backend": "loky", "initializer": _begin_worker, "initargs": (os.getpid(),)} if jobs != 1 else {}
    else:
        with (_ray if backend == "ray" else _dask)(address) as parameters:
            yield parameters


@contextlib.contextmanager
def _ray(address: str | None) -> Iterator[dict[str, Any]]:
    """Ray at an address, or started here, where it listens on no other interface than the loopback one."""
    here = {"address": "local", "include_dashboard": False, "_node_ip_address": _LOOPBACK}
    with _needs("ray", "pip install 'ray[default]'"), _environment(_RAY_CLUSTER, "0" if address is None else None):
        import ray
        from ray.util.joblib import register_ray
    register_ray()
    token = (
        "where the cluster asks for a token, RAY_AUTH_MODE=token has to be set, and the token as `ray status` takes it"
    )
    with _connection(f"Ray at {address or 'this machine'}", token):
        ray.init(log_to_driver=False, ignore_reinit_error=True, **({"address": address} if address else here))
    try:
        if address is None and ray.util.get_node_ip_address() != _LOOPBACK:
            raise OptionError(f"Ray was in use before, and does not listen on {_LOOPBACK} alone; name its --address")
        yield {"backend": "ray"}
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _dask(address: str | None) -> Iterator[dict[str, Any]]:
    """Dask at an address, or started here, where it listens on no other interface than the loopback one."""
    with _needs("dask", "pip install 'dask[distributed]'"):
        from dask.distributed import Client, LocalCluster
    with contextlib.ExitStack() as stack:
        with _connection(f"Dask at {address or 'this machine'}"):
            given = address or stack.enter_context(LocalCluster(host=_LOOPBACK, dashboard_address=None))
            client = stack.enter_context(Client(given, timeout=20))
        yield {"backend": _register_dask(), "client": client, "wait_for_workers_timeout": 60}


@contextlib.contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Inside, a variable of the environment has this value, where it is not None."""
    before = os.environ.get(name)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        if value is not None:
            os.environ.pop(name)
            if before is not None:
                os.environ[name] = before


def _register_dask() -> str:
    """The name of joblib's backend for Dask, but for one thing: where a cluster has room for one task, or has it so far,
    joblib would do all of them in this process."""
    import joblib
    from joblib._dask import DaskDistributedBackend

    class OnTheCluster(DaskDistributedBackend):
        def effective_n_jobs(self, n_jobs: int) -> int:
            return max(2, int(super().effective_n_jobs(n_jobs)))

    joblib.register_parallel_backend("upswap: dask", OnTheCluster)
    return "upswap: dask"


def _begin_worker(owner: int) -> None:
    """In a local worker: Ctrl-C goes to every process of the terminal, and the main one stops the workers. Where that is
    killed it cannot, and joblib's workers would stay for minutes: they go by themselves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == owner:  # another one takes over the children of a process that is gone
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _needs(package: str, how: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise OptionError(f"--backend {package} needs the package {package}: {how}") from error


@contextlib.contextmanager
def _connection(what: str, hint: str = "") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the engines raise whatever their transport does
        raise OptionError(f"there is no connection to {what}: {error}{hint and f' ({hint})'}") from error
