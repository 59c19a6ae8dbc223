"""`upswap export`: a patched model as the file of a runtime."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import SIZE, common_options, weights_options
from .output import note, progress, say, say_json, stdout

if TYPE_CHECKING:
    from ...export.export import Exported

#: `upswap.export.targets.TARGETS` and what samplers there are; `--help` answers without torch. A test holds them together.
TARGETS = (
    "onnxruntime",
    "openvino",
    "tensorrt",
    "rknn",
    "coreml",
    "litert",
    "executorch",
    "ncnn",
    "torch-export",
)  # fmt: skip
SAMPLERS = ("auto", "gridsample", "gather", "window")


@click.command(short_help="Write a patched model for a runtime, and check it there.")
@click.argument("source", metavar="PATCHED")
@click.option("-o", "--output", metavar="OUT", help="What to write.  [default: PATCHED, with the target's suffix]")
@click.option("--target", type=click.Choice(TARGETS), default="onnxruntime", show_default=True, help="The runtime.")
@click.option(
    "--sampler",
    type=click.Choice(SAMPLERS),
    default="auto",
    show_default=True,
    help="How upsamplers read a map; auto is what was measured fastest in the runtime.",
)
@click.option("--opset", type=int, default=18, show_default=True, help="Of an ONNX graph.")
@click.option(
    "--dynamic/--static",
    "dynamic",
    default=None,
    help="Leave batch and image size open, or not.  [default: what the runtime takes]",
)
@click.option("--half", is_flag=True, help="float16, but for coordinates.")
@click.option(
    "--int8", metavar="FILE", help="8-bit integers, but for coordinates; FILE is a .npy or .npz of typical inputs."
)
@click.option("--calibration", metavar="FILE", help="Such a file for --sampler window, which has to know the offsets.")
@click.option("--simplify", is_flag=True, help="Have onnxslim go over the graph.")
@click.option(
    "--check/--no-check", default=True, show_default=True, help="Compare the file with the model on three inputs."
)
@click.option("--input-size", type=SIZE, help="Size of the example image.  [default: found by trying]")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@weights_options("PATCHED")
@common_options
def export(source: str, output: str | None, **options: Any) -> None:
    """Write PATCHED as a file of a runtime, once it computes there what it computes in PyTorch.

    PATCHED is a file that upswap saved, or any SOURCE that `upswap convert` takes. A model that is not patched is exported as
    it is.
    """
    from ...export.export import export_onnx
    from ...export.targets import target_named
    from ...files.naming import exported_name
    from ...files.open_source import open_source
    from ...probe.inputs.infer import candidates
    from ...probe.observe import first_that_runs
    from ...surgery.wrappers import unwrapped

    target = target_named(options["target"])
    opened = open_source(source, trust=options["trust"], weights=options["weights"], key=options["key"])
    if opened.said is not None:
        note(opened.said)
    size = options["input_size"]
    given = {
        name: options[name]
        for name in (
            "target", "sampler", "opset", "dynamic", "half", "int8", "calibration", "simplify", "check", "force",
        )
    }  # fmt: skip
    model = unwrapped(opened.model)
    inputs = None if size is None else first_that_runs(model, candidates(model, size)).inputs
    path = Path(output) if output is not None else exported_name(source, target.suffix)
    done = export_onnx(model, path, inputs, progress=progress, **given)
    if options["as_json"]:
        places = {"path": done.path, "weights": done.weights, "metadata": done.metadata}
        paths = {name: None if place is None else str(place) for name, place in places.items()}
        say_json({**dataclasses.asdict(done), **paths, "error": done.error})
    else:
        _print(done, check=options["check"])


def _print(done: Exported, *, check: bool) -> None:
    console = stdout()
    rows = {
        "target": done.target if done.form == "float32" else f"{done.target}, {done.form}",
        "sampler": done.sampler,
        "inputs": ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in done.inputs.items()),
        "outputs": ", ".join(done.outputs),
    }
    if done.nodes is not None:
        rows["graph"] = f"{done.nodes} nodes" + (f", opset {done.opset}" if done.opset is not None else "")
    if done.error is None:
        rows["checked"] = "not here: nothing on this machine runs such a file" if check else "not asked for"
    else:
        measure = "of the standard deviation (rms)" if done.form == "int8" else "of the largest output"
        rows["difference"] = (
            f"{done.error:.1e} {measure}, in {done.ran_in} at {'; '.join(row.shapes for row in done.checked)}"
        )
    if done.unpatched_error is not None:
        rows["unpatched"] = f"{done.unpatched_error:.1e} in the same precision"
    rows["saved"] = f"{done.path} ({_megabytes(done)})"
    for name, text in rows.items():
        console.print(f"{name:<11}{text}", soft_wrap=True, markup=False, highlight=False)
    if done.target not in ("onnxruntime", done.ran_in) and done.ran_in:
        say(f"\n{done.target} itself does not run here: the graph was checked in {done.ran_in}")


def _megabytes(done: Exported) -> str:
    files = [done.path] if done.path.is_file() else [file for file in done.path.rglob("*") if file.is_file()]
    files += [] if done.weights is None else [done.weights]
    return f"{sum(file.stat().st_size for file in files) / 1e6:.2f} MB"
