"""`upswap convert`: patch a model, verify that it computes what it did, save it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import model_options, named, open_model, patch_options

if TYPE_CHECKING:
    from torch import nn

    from ...plan.plan import Plan
    from ...surgery.checking.verification import Capture


@click.command(short_help="Swap a model's feature upsampling, verify, and save it.")
@model_options
@click.option(
    "-o", "--output", metavar="OUT", help="What to write: .pt, .safetensors, or a folder.  [default: SOURCE.upswap.pt]"
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option("--dry-run", is_flag=True, help="Do everything but save.")
def convert(output: str | None, force: bool, dry_run: bool, **options: Any) -> None:
    """Swap the feature upsampling of SOURCE, verify that it still computes the same, and save it.

    SOURCE is a file (.pt, .safetensors) or a spec: smp:unet?encoder_name=resnet34&classes=3, timm:NAME,
    torchvision:NAME, hf:FOLDER (a model folder of transformers or SMP), python:package.module:factory.
    """
    from ... import api
    from ...files import checkpoint
    from ...surgery.checking.verification import compare
    from .tables import progress

    target = Path(output) if output else default_output(options["source"])
    if not dry_run:
        # Before the work, not after it.
        checkpoint.check_target(target, source=options["source"], force=force)
    with progress("looking at the model"):
        source, example_inputs = open_model(options)
    model = source.model
    before = _count(model)
    with progress("swapping"):
        before_patch = _patch(model, example_inputs, options)
    plan = api.plan_of(model)
    with progress("verifying"):
        report = compare(before_patch, model)
    report.check(plan)
    saved = None
    if not dry_run:
        with progress(f"saving {target}"):
            saved = checkpoint.save(model, target, source=source.spec or source.path, force=force)
    result = {
        "source": options["source"],
        "model": plan.model_class,
        "saved": None if saved is None else str(saved),
        "parameters": before,
        "parameters_added": _count(model) - before,
        "max_abs_diff": report.max_abs_diff,
        "max_rel_diff": report.max_rel_diff,
        "verified_at": list(dict.fromkeys(row.inputs for row in report.rows)),
        "load": None if saved is None else _load_line(saved, options["trust"], plan),
        "plan": plan.to_dict(),
    }
    if options["as_json"]:
        click.echo(json.dumps(result, indent=2, sort_keys=True))
    else:
        _print(result, plan)


def _patch(model: nn.Module, example_inputs: Any, options: dict[str, Any]) -> Capture:
    """Patch `model`; what it computed before. The runs that the plan was made from tell, so that nothing is run twice."""
    from ... import api
    from ...plan.plan import Options
    from ...surgery import planning
    from ...surgery.apply import apply, is_patched
    from ...surgery.checking.verification import capture, captured
    from ...surgery.planning import decide, nothing_to_swap

    chosen = patch_options(options)
    planning.check_model(model)
    if is_patched(model):
        found = capture(model, example_inputs)
        api.patch(model, example_inputs, **chosen)  # which says so
        return found
    decision = decide(model, example_inputs, Options(**chosen))
    if not decision.plan.swapped:
        raise nothing_to_swap(decision.plan)
    found = captured(model, decision.runs)
    apply(model, decision.plan, decision.rewritings)
    return found


def default_output(source: str) -> Path:
    """`unet.pt` gives `unet.upswap.pt` beside it, `smp:unet?...` gives `unet.upswap.pt` here, a folder gives a folder.

    >>> default_output("models/unet.pt").as_posix(), default_output("smp:Unet?classes=3").as_posix()
    ('models/unet.upswap.pt', 'unet.upswap.pt')
    >>> default_output("hf:models/segformer").as_posix(), default_output("python:nets.unet:make").as_posix()
    ('models/segformer-upswap', 'make.upswap.pt')
    """
    from ...architectures.spec import parse

    spec = parse(source)
    if spec is not None and spec.scheme != "hf":
        name = spec.name.rpartition(":")[2].lower().replace("/", "_")
        return Path(f"{name}.upswap.pt")
    path = named(Path(source if spec is None else spec.name))
    if spec is not None or path.is_dir():
        return path.with_name(f"{path.name}-upswap")
    suffix = path.suffix if path.suffix in (".pt", ".pth", ".safetensors") else ".pt"
    return path.with_name(f"{path.stem}.upswap{suffix}")


def _print(result: Mapping[str, Any], plan: Plan) -> None:
    from ...nn.registry import is_exact
    from .tables import sites_table, stdout, summary

    console = stdout()
    console.print(f"[bold]{plan.model_class.rpartition('.')[2]}[/bold]: {summary(plan)}\n")
    console.print(sites_table(plan, console.width))
    added, before = result["parameters_added"], result["parameters"]
    share = f" ({added / before:+.2%} of {before:,})" if before else ""
    console.print(f"\nparameters added   {added:,}{share}")
    difference = f"{result['max_rel_diff']:.1e} of the largest output, at inputs {'; '.join(result['verified_at'])}"
    why = "" if is_exact(plan.options) else f" ({plan.options.upsampler} with these options is not exact at step 0)"
    console.print(f"step-0 difference  {difference}{why}")
    if result["saved"] is None:
        console.print("saved              nothing (dry run)")
        return
    size = _bytes(Path(result["saved"]))
    console.print(f"saved              {result['saved']} ({size / 1e6:.1f} MB)\n")
    console.print("In Python:\n")
    # As it is to be typed: no wrapping, no markup.
    click.echo(f"    import upswap\n    {result['load']}")
    for hint in plan.hints:
        click.echo(f"note: {hint}", err=True)


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))


def _load_line(path: Path, trust: tuple[str, ...], plan: Plan) -> str:
    from ...architectures.spec import package_of, parse
    from ...files.checkpoint import says_how_it_is_built, spec_in

    spec = parse(spec_in(path) or "")
    if spec is not None and spec.scheme == "python":
        trust = (*trust, package_of(spec).partition(".")[0])
    arguments = [repr(str(path)).replace("'", '"')]
    if not says_how_it_is_built(path, trust):
        arguments.append(f"{plan.model_class.rpartition('.')[2]}(...)")
    if trust:
        arguments.append(f"trust={list(dict.fromkeys(trust))!r}".replace("'", '"'))
    return f"model = upswap.load({', '.join(arguments)})"


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
