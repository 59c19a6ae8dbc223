"""The package as a whole: what importing it costs, what its documents promise, how its examples run."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import upswap

ROOT = Path(__file__).parent.parent
HEAVY = ("timm", "segmentation_models_pytorch", "torchvision", "transformers", "click", "rich")


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, cwd=cwd
    )


def test_importing_upswap_and_patching_needs_torch_alone() -> None:
    code = f"""
import sys, torch
before = set(sys.modules)  # torch may use some of these itself
import upswap
for name in upswap.__all__:
    getattr(upswap, name)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Upsample(scale_factor=2), torch.nn.Conv2d(4, 4, 3))
upswap.patch(model, torch.randn(1, 3, 16, 16))
found = [name for name in {HEAVY} if name in sys.modules and name not in before]
sys.exit(f"imported: {{found}}" if found else 0)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["inspect", "--help"], ["convert", "--help"], ["yaml", "--help"], ["convert"], []],
)
def test_help_and_usage_errors_answer_without_torch(arguments: list[str]) -> None:
    code = """
import sys
from upswap.apps.cli import run
code = run(sys.argv[1:])
heavy = [name for name in ("torch", "numpy", "safetensors") if name in sys.modules]
sys.exit(f"imported: {heavy}" if heavy else code)
"""
    done = python(code, *arguments)
    assert done.returncode in (0, 2), done.stderr
    assert "imported" not in done.stderr


def test_the_public_names_are_what_the_package_lists() -> None:
    assert len(set(upswap.__all__)) == len(upswap.__all__)
    assert set(upswap.__all__) <= set(dir(upswap))
    # A module of a public function's name would hide the function once it is imported.
    modules = {module.name.rpartition(".")[2] for module in pkgutil.iter_modules(upswap.__path__)}
    assert not modules & set(upswap.__all__)
    for name in ("inspect", "patch", "unpatch", "verify", "upsamplers", "save", "load"):
        assert callable(getattr(upswap, name)), name


def test_the_version_is_one() -> None:
    done = subprocess.run([sys.executable, "-m", "upswap", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"upswap, version {upswap.__version__}"
    assert (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]["path"] == "upswap/_version.py"
    )


def test_it_is_typed() -> None:
    assert (ROOT / "upswap" / "py.typed").exists()


def test_the_readmes_commands_are_those_ci_runs() -> None:
    """CI runs on a bare machine what the README tells people to type."""
    commands = [
        line
        for block in re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        for line in block.splitlines()
    ]
    one_line = [command for command in commands if command.startswith("python3 -m venv")]
    assert len(one_line) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    for command in one_line:
        for step in command.split(" && "):
            assert re.search(rf"(^|&& ){re.escape(step)}($| &&)", ci, re.MULTILINE), step
    for command in one_line:
        for step in command.split(" && "):
            for word in shlex.split(step):
                if word.startswith(("examples/", "docs/", "tests/")):
                    assert (ROOT / word).exists(), word


def test_the_known_set_pins_whatever_the_tests_install() -> None:
    """A library without a pin is the newest there is, and the README's command may fail on the day it appears."""

    def needed(requirements: list[str]) -> set[str]:
        """Their names, and those of the extras of this package among them."""
        found = set()
        for each in map(Requirement, requirements):
            if each.name == "upswap":
                found |= needed([other for extra in each.extras for other in project["optional-dependencies"][extra]])
            else:
                found.add(canonicalize_name(each.name))
        return found

    lines = [
        line for line in (ROOT / "tests" / "constraints.txt").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    if not lines:
        pytest.skip("there are no constraints: .ci/run --newest has emptied the file")
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = needed([*project["dependencies"], "upswap[test]"])
    assert {"torch", "ray", "openvino", "pytest"} <= wanted
    assert wanted <= needed(lines)


def test_the_readmes_options_exist() -> None:
    from upswap.apps.cli import cli

    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    mentioned = {
        flag
        for line in re.findall(r"upswap (?:inspect|convert)[^\n`]*", text)
        for flag in re.findall(r"(?<=\s)--[a-z-]+", line)
    }
    assert mentioned
    assert mentioned <= known


def test_links_in_the_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)


@pytest.mark.slow
def test_the_examples_run_one_after_the_other(tmp_path: Path) -> None:
    """The main job from end to end, each step in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def step(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    step(sys.executable, str(ROOT / "examples" / "make_unet.py"))
    said = step(sys.executable, "-m", "upswap", "convert", "unet.pt", "--style", "lp", "--groups", "4")
    assert 'upswap.load("unet.upswap.pt")' in said
    said = step(sys.executable, str(ROOT / "examples" / "finetune.py"), "unet.upswap.pt")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", said)]
    assert len(losses) == 11
    assert losses[-1] < 0.8 * losses[0]
    assert "10 of 10 upsampler parameters moved" in said
