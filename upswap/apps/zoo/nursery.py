"""A process of its own for every model, without paying for imports every time.

A worker keeps one nursery: a process that imports torch and the model library once, and forks for each model. The fork
has a limit on time and on memory, so that a model that hangs or eats memory costs itself alone. The nursery speaks JSON lines
on its standard input and output, and goes, with the model in work, when the input ends: when its worker is gone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection, wait
from typing import IO, Any

from .rows import Row, Task

#: Imported before the first fork: what every model needs, the parts that torch imports late among them.
_ALWAYS = ("torch", "torch.fx", "torch.utils.flop_counter", "torch._subclasses.fake_tensor", "upswap.apps.zoo.job")

_LIBRARIES = {"smp": "segmentation_models_pytorch", "timm": "timm", "torchvision": "torchvision", "hf": "transformers"}

#: Seconds before a kill from outside is held against the model. Whoever ends a worker may end what it started first, as joblib
#: does from the leaves up, with the other workers when one is lost and on Ctrl-C: the worker is then gone before they are over.
_GRACE = 2.0


# -- in the worker --------------------------------------------------------------------------------------------------------


class Nursery:
    """The worker's side: a process that does one task at a time."""

    def __init__(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        # A session of its own: Ctrl-C reaches the main process alone, which stops the rest in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "upswap.apps.zoo.nursery"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,
            text=True,
        )

    def run(self, task: Task) -> Row:
        """Do a task; a row comes back whatever happens to the process that does it."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise OSError("the nursery has no pipes")
        try:
            stdin.write(json.dumps(task.to_dict()) + "\n")
            stdin.flush()
            answer = stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            time.sleep(_GRACE)
            self.close()
            return Row(task.source, error="the process that starts the models was killed", worker=worker_name())
        return Row.from_dict(json.loads(answer))

    @property
    def alive(self) -> bool:
        """Whether it can take another task."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, and the model in work with it."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._process.wait()


def worker_name() -> str:
    """This process, as people find it: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


# -- in the nursery -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Read tasks, one a line, fork for each, and write its row."""
    # Libraries print; the answers have a channel of their own.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in _ALWAYS:
        importlib.import_module(name)
    tasks = os.fdopen(os.dup(sys.stdin.fileno()), "rb", buffering=0)
    for line in iter(lambda: _line(tasks), b""):
        task = Task.from_dict(json.loads(line))
        with contextlib.suppress(Exception):  # a package that is not there is the model's error, told in its row
            importlib.import_module(_LIBRARIES.get(task.source.partition(":")[0], "torch"))
        answers.write(json.dumps(_supervised(task, tasks).to_dict()) + "\n")


def _line(stream: Any) -> bytes:
    """A line, read without a buffer that would hide the next from `wait`."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = stream.read(1)
        if not byte:
            return b""
        line += byte
    return bytes(line)


def _supervised(task: Task, tasks: Any) -> Row:
    """Fork, wait for the row, and put an end to what takes too long or is not wanted any more."""
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryFile() as output:
        process = context.Process(target=_child, args=(task, theirs, output.fileno()))
        process.start()
        theirs.close()
        ready = wait([ours, process.sentinel, tasks], task.settings.timeout)
        row: Row | None = None
        if ours in ready or ours.poll():
            with contextlib.suppress(EOFError):
                row = Row.from_dict(ours.recv())
        elif tasks in ready:  # its end: no task comes before the answer to the last
            _kill(process)
            raise SystemExit(0)
        if row is None:
            late = process.is_alive() and not ready
            _kill(process)
            error = f"took longer than {task.settings.timeout:g} s (--timeout)" if late else _death(process, output)
            if process.exitcode == -signal.SIGKILL and not late and wait([tasks], _GRACE):
                raise SystemExit(0)
            row = Row(task.source, error=error)
        process.join(5)
        _kill(process)
    row.worker = worker_name()
    return row


def _child(task: Task, answer: Connection, output: int) -> None:
    os.dup2(output, 1)
    os.dup2(output, 2)
    with contextlib.suppress(OSError):  # on another machine of a cluster there may be no such folder
        os.chdir(task.home)
    from .job import run

    limit = task.settings.memory
    try:
        if limit is not None:
            address_space = _mapped() + limit
            resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space))
        row = run(task)
        # torch has no class of error for this, only the words.
        if limit is not None and "can't allocate memory" in row.error:
            row.status, row.error = "failed", _too_large(limit)
    except MemoryError:
        row = Row(task.source, error=_too_large(limit or 0))
    row.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    answer.send(row.to_dict())


def _too_large(limit: int) -> str:
    return f"needs more than {limit / 2**30:.3g} GiB of memory (--memory)"


def _mapped() -> int:
    """Bytes of address space that this process has already, shared libraries mostly."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _kill(process: Any) -> None:
    if process.is_alive():
        process.kill()
        process.join()


def _death(process: Any, output: IO[bytes]) -> str:
    """Why a process is gone that gave no row: the signal, and the last thing it said."""
    process.join(1)
    code = process.exitcode
    output.seek(0)
    said = output.read().decode(errors="replace").strip().splitlines()
    last = f"; the last it said: {said[-1][:200]}" if said else ""
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system's memory ran out?)" if name == "SIGKILL" else ""
        return f"its process was killed by {name}{hint}{last}"
    return f"its process ended with code {code} and no result{last}"


if __name__ == "__main__":
    main()
