"""The rooms of the package: their contracts, and the tests that mirror them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Files of no more lines need no tests of their own.
SHORT = 80

#: Files that are only tested through others today. No entry may be added; one whose mirror exists has to go.
WITHOUT = {
    "apps/bench/contenders.py",
    "apps/bench/flops.py",
    "apps/bench/meters.py",
    "apps/bench/models.py",
    "apps/bench/plot.py",
    "apps/bench/upsampling.py",
    "apps/cli/bench.py",
    "apps/cli/convert.py",
    "apps/cli/options.py",
    "apps/cli/verify.py",
    "apps/cli/zoo.py",
    "apps/zoo/checks.py",
    "apps/zoo/engine.py",
    "apps/zoo/job.py",
    "apps/zoo/nursery.py",
    "apps/zoo/page.py",
    "apps/zoo/rows.py",
    "architectures/spec.py",
    "files/formats/description.py",
    "files/formats/pt.py",
    "files/formats/safetensors.py",
    "files/safety/stand_ins.py",
    "nn/arguments.py",
    "nn/sampling/pointwise.py",
    "plan/plan.py",
    "probe/callsites/functions.py",
    "probe/callsites/stack.py",
    "probe/dataflow.py",
    "probe/inputs/describe.py",
    "probe/inputs/inputs.py",
    "probe/inputs/variations.py",
    "probe/resize_calls.py",
    "probe/survey.py",
    "surgery/checking/first_difference.py",
    "surgery/rewritten_class.py",
    "surgery/routes/rewrite_calls.py",
    "surgery/routes/runtime.py",
    "surgery/routes/source_route.py",
    "surgery/routes/traceable.py",
    "surgery/routes/tracer.py",
    "surgery/trial.py",
}

#: Mirrors that stand for more than one file.
SHARED: dict[str, str] = {
    "export/making.py": "export/test_export.py",
    "export/targets.py": "export/test_options.py",
    "files/formats/host_architecture.py": "files/formats/test_host_folder.py",
    "files/formats/host_class.py": "files/formats/test_host_folder.py",
    "files/safety/pickle_walks.py": "files/safety/test_pickle_scan.py",
    "files/safety/pickled_calls.py": "files/safety/test_pickle_scan.py",
    "probe/guide_ways.py": "probe/test_guides.py",
    "surgery/routes/guiding.py": "surgery/test_guides.py",
    "nn/sampling/triton_kernels.py": "nn/sampling/test_triton.py",
    "nn/sampling/triton_launch.py": "nn/sampling/test_triton.py",
}


def test_the_contracts_between_the_rooms_are_kept() -> None:
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "0 broken" in done.stdout


def mirrors(file: str) -> list[Path]:
    """A file's test files: `a/b.py` has `a/test_b.py` and `a/test_b_*.py`; an `__init__.py` has its folder's name."""
    if file in SHARED:
        return [path for path in [ROOT / "tests" / SHARED[file]] if path.exists()]
    path = ROOT / "tests" / file
    name = (path.parent.name if path.parent.name != "tests" else "package") if path.stem == "__init__" else path.stem
    return [*path.parent.glob(f"test_{name}.py"), *path.parent.glob(f"test_{name}_*.py")]


def test_every_file_of_some_length_has_its_mirror() -> None:
    package = ROOT / "upswap"
    long = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if len(path.read_text().splitlines()) > SHORT
    }
    assert long, "no files of the package"
    missing = {file for file in long if not mirrors(file)}
    assert sorted(missing - WITHOUT) == [], "these need a mirror under tests/"
    assert sorted(WITHOUT - missing) == [], "these have a mirror, are short or are gone: take them off the list"
