"""What `.ci/matrix` installs, and the row it prints; run by the Python of its environment, in the copied tree."""

import platform
import sys
import tomllib
from datetime import date
from importlib.metadata import requires, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name


def needed(extra: str, project: dict, pinned: set[str]) -> list[str]:
    """The project's requirements with those of an extra, its own extras opened, but for the pinned names."""
    lines = []
    for line in [*project["dependencies"], *project["optional-dependencies"][extra]]:
        requirement = Requirement(line)
        if requirement.name == project["name"]:
            lines += [inner for own in sorted(requirement.extras) for inner in needed(own, project, pinned)]
        elif canonicalize_name(requirement.name) not in pinned:
            lines.append(line)
    return list(dict.fromkeys(lines))


def allowed(constraints: str, pinned: set[str]) -> list[str]:
    """The constraints, but for pinned names and for what a pinned release rules out."""
    wanted = [Requirement(line) for name in pinned for line in requires(name) or ()]
    wanted = [found for found in wanted if found.marker is None or found.marker.evaluate({"extra": ""})]
    lines = []
    for line in constraints.splitlines():
        if line.startswith("#"):
            continue
        name, release = line.split("==")
        name = canonicalize_name(name)
        ruled_out = any(canonicalize_name(found.name) == name and release not in found.specifier for found in wanted)
        # Each release of torchvision asks for one release of torch: pip finds the one that fits.
        follows = name == "torchvision" and "torch" in pinned
        if name not in pinned and not ruled_out and not follows:
            lines.append(line)
    return lines


def main() -> None:
    """Write the two files for pip, or print the row."""
    if sys.argv[1] == "--row":
        what, result, seconds, *pins = sys.argv[2:]
        libraries = (
            ", ".join(pin.replace("==", " ") for pin in pins if not pin.startswith("torch==")) or "as constrained"
        )
        row = platform.python_version(), version("torch"), libraries, what, result, seconds, date.today().isoformat()
        sys.stdout.write(f"| {' | '.join(row)} |\n")
        return
    constraints, *pins = sys.argv[1:]
    pinned = {canonicalize_name(Requirement(pin).name) for pin in pins}
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    Path("matrix-requirements.txt").write_text("\n".join([*needed("test", project, pinned), *pins, ""]))
    Path("matrix-constraints.txt").write_text("\n".join([*allowed(Path(constraints).read_text(), pinned), ""]))


if __name__ == "__main__":
    main()
