"""The Triton kernels on a GPU: whether they are right, how fast, and what the default of UPSWAP_TRITON should be.

    python benchmarks/gpu.py [--json rows.jsonl] [--part compare] [--device cpu --quick]

Under nine minutes, whatever happens: each part is a process with a time of its own, and one that runs out of it says so.

    compare      kernels against float64 by torch's own sampler, and modules by them against modules by the plain path
    determinism  the same call again, the same bits
    speed        upsamplers side by side: DySample by the kernels and by the plain path, bilinear, nearest, CARAFE, the formula
    models       whole models as they were, patched by the plain path, and patched by the kernels

Ratios are of things timed in turn, as the median with its quartiles. Exits with 1 where a comparison fails. `--device cpu` runs
the parts in Triton's interpreter, with `--quick`: that shows that they work, and its times say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Seconds of each part, the start of its process included.
PARTS = {"compare": 175, "determinism": 35, "speed": 160, "models": 130}

# All of them, and how much longer than its time a part may take for the case that it is at.
_ALL, _GRACE = 505, 20

# What `gpu_parts.py` exits with where the device is lost, and where there is none.
_LOST, _NOTHING = 3, 4

# A ratio counts as slower where the quartiles agree that it is, and by more than timing scatters.
_SLOWER = 1.03
_RATIO = "over_plain"


def run(part: str, arguments: argparse.Namespace, end: float, environment: dict[str, str]) -> Iterator[Row]:
    """The rows of a part. Where a process ends within a case, another one goes on with the next."""
    until = min(time.time() + PARTS[part], end)
    cases, begun, name = None, 0, ""
    while time.time() < until:
        command = [sys.executable, str(Path(__file__).with_name("gpu_parts.py")), part, "--device", arguments.device]
        command += ["--until", str(until), "--skip", str(begun), *(["--quick"] if arguments.quick else [])]
        name = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            timer = threading.Timer(until + _GRACE - time.time(), process.kill)
            timer.start()
            try:
                for line in process.stdout or ():
                    row = json.loads(line)
                    if row["status"] == "case":
                        begun, name = row["number"] + 1, row["case"]
                        continue
                    cases = row.get("cases", cases)
                    yield row
                code = process.wait()
            finally:  # also where nobody wants more rows
                timer.cancel()
                process.kill()
        if code == _NOTHING:
            return
        if time.time() >= until + _GRACE:
            yield {"part": part, "case": name, "status": "left out", "problem": "out of time within the case"}
        elif code not in (0, _LOST):
            yield {"part": part, "case": name, "status": "failed", "problem": f"its process ended with {code}"}
        # The next process has to begin another case than this one did.
        if code == 0 or not name or begun == cases:
            break
    if cases is None or begun < cases:
        rest = "it began" if cases is None else f"{cases - begun} of {cases} cases"
        yield {"part": part, "status": "left out", "problem": f"out of time before {rest}"}


def spread(quartiles: Sequence[float] | None) -> str:
    """A ratio in a table: the median, then its quartiles."""
    return "-" if quartiles is None else f"{quartiles[1]:.2f} ({quartiles[0]:.2f} to {quartiles[2]:.2f})"


def table(heads: Sequence[str], lines: Sequence[Sequence[object]]) -> None:
    """Print a table, if it has lines."""
    if lines:
        print(f"| {' | '.join(heads)} |", "|".join(["", *["---"] * len(heads), ""]), sep="\n")
        for cells in lines:
            print(f"| {' | '.join(map(str, cells))} |")


def compared(rows: Sequence[Row]) -> None:
    """A line for each group of comparisons."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if "group" in row:
            groups.setdefault(row["group"], []).append(row)
    lines = []
    for name, found in sorted(groups.items()):
        worst = max((row["of_limit"] for row in found if "of_limit" in row), default=None)
        errors = [max((row[key] for row in found if key in row), default=None) for key in ("error", "plain_error")]
        right = sum(row["status"] == "right" for row in found)
        cells = ["-" if error is None else f"{error:.1e}" for error in errors]
        lines.append((name, len(found), right, *cells, "-" if worst is None else f"{worst:.2f}"))
    table(("comparison", "cases", "right", "largest error", "of the plain path", "of its limit"), lines)
    first = sorted(row["first_s"] for row in rows if "first_s" in row)
    if first:
        print(f"First calls, with compiling: {first[len(first) // 2]:.2f} s at the median, {first[-1]:.2f} s at most.")
    varying = [row for row in rows if row.get("varies_without")]
    if any("varies_without" in row for row in rows):
        print(f"Without deterministic algorithms bits differ between runs in {len(varying)} cases.")


def timed(rows: Sequence[Row]) -> None:
    """A line for each upsampler at each shape."""
    heads = ("case", "upsampler", "ms", "over bilinear", "over the formula", "kernels over plain")
    ratios = ("over_bilinear", "over_reference", _RATIO)
    table(
        heads,
        [
            (row["case"], row["contender"], f"{row['ms']:.3f}", *(spread(row.get(key)) for key in ratios))
            for row in rows
            if "ms" in row
        ],
    )


def whole(rows: Sequence[Row]) -> None:
    """A line for each model."""
    heads = (
        "model",
        "status",
        "error",
        "error at step 0",
        "ms",
        "plain over original",
        "kernels over original",
        "over plain",
    )
    ratios = ("plain_over_original", "triton_over_original", _RATIO)
    table(
        heads,
        [
            (
                row["case"],
                row["status"],
                f"{row['error']:.1e}",
                f"{row['step0']:.1e}",
                f"{row['ms']['original']:.2f}",
                *(spread(row.get(key)) for key in ratios),
            )
            for row in rows
            if "ms" in row
        ],
    )


_TABLES = {"compare": compared, "determinism": compared, "speed": timed, "models": whole}


def verdict(rows: Sequence[Row], device: str) -> str:
    """What the default of UPSWAP_TRITON should be, and why."""
    bad = [row for row in rows if row["status"] in ("wrong", "failed")]
    if bad:
        return f"off: {len(bad)} cases are wrong or failed, which are listed above."
    if device == "cpu":
        return "none: times of Triton's interpreter on a CPU say nothing of a GPU. What was compared is right."
    parts = {row["part"] for row in rows if row["status"] in ("right", "timed")}
    missing = [part for part in PARTS if part not in parts]
    if missing:
        return f"none: nothing was measured in {', '.join(missing)}."
    ratios = {_named(row): row[_RATIO] for row in rows if _RATIO in row}
    mean = math.exp(sum(math.log(middle) for _, middle, _ in ratios.values()) / len(ratios))
    slower = [f"{name}: {spread(found)}" for name, found in ratios.items() if found[0] > 1 and found[1] > _SLOWER]
    said = f"The kernels take {mean:.2f} of the plain path, the geometric mean of {len(ratios)} cases."
    rest = [f"{row['part']}: {row['problem']}" for row in rows if row["status"] == "left out"]
    if rest:
        said += " Left out: " + "; ".join(rest) + "."
    if mean >= 1:
        return f"off. {said}"
    if not slower:
        return f"on. {said} No case is slower. `triton_launch.wanted` and docs/how-it-works.md state the default."
    return (
        f"on, but for what is slower, which `triton_launch.usable` should leave to the plain path. {said} Slower:"
        + "".join(f"\n- {line}" for line in slower)
    )


def _named(row: Row) -> str:
    return " ".join(filter(None, (row["part"], row["case"], row.get("contender"))))


def main() -> int:
    """Run the parts and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="few and small cases")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="only these parts, and no verdict")
    parser.add_argument("--json", type=Path, help="write a row a line to this file")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu takes hours in Triton's interpreter: add --quick")
    end = time.time() + _ALL
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        # Of its own: first calls are then first calls.
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        file = stack.enter_context(arguments.json.open("w")) if arguments.json else None
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        if arguments.device == "cpu":
            environment["TRITON_INTERPRET"] = "1"
        for part in arguments.part or PARTS:
            print(f"\n## {part}" + (" (Triton's interpreter: no times of a GPU)" if arguments.device == "cpu" else ""))
            found = []
            for row in run(part, arguments, end, environment):
                if file:
                    print(json.dumps(row), file=file, flush=True)
                found.append(row)
                if row["status"] == "no device":
                    print(
                        f"{row['problem']}. `--device cpu --quick` shows that the parts work, in Triton's interpreter."
                    )
                    return 2
                if row["status"] == "begun":
                    print(
                        ", ".join(f"{key} {row[key]}" for key in ("device", "torch", "triton", "upswap")),
                        "\n",
                        flush=True,
                    )
            _TABLES[part](found)
            for row in found:
                if row["status"] in ("wrong", "failed", "left out"):
                    what = ", ".join(row.get("wrong", ())) or row.get("problem", "")
                    print(f"{row['status']}: {_named({'case': '', **row})}: {what}", row.get("errors", ""))
            sys.stdout.flush()
            rows += found
    if not arguments.part:
        print(f"\n## The default of UPSWAP_TRITON\n\n{verdict(rows, arguments.device)}")
    return int(any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
