"""`upswap inspect`: what a model's resize calls are, and what `convert` would do about each."""

from __future__ import annotations

from typing import Any

import click

from .options import model_options, open_model, patch_options


@click.command(short_help="List a model's resize calls and what would be done about each.")
@model_options
def inspect(**options: Any) -> None:
    """List the resize calls of SOURCE and what `convert` would do about each.

    SOURCE is a file (.pt, .safetensors) or a spec: smp:unet?encoder_name=resnet34&classes=3, timm:NAME,
    torchvision:NAME, hf:FOLDER (a model folder of transformers or SMP), python:package.module:factory.
    """
    from ... import api
    from ...plan.table import sites_table
    from .tables import progress, stdout

    with progress("looking at the model"):
        source, example_inputs = open_model(options)
        plan = api.inspect(source.model, example_inputs, **patch_options(options))
    if options["as_json"]:
        click.echo(plan.to_json(indent=2))
        return
    console = stdout()
    console.print(f"[bold]{type(source.model).__name__}[/bold]: {plan.summary}", highlight=False)
    if plan.sites:
        console.print()
        console.print(sites_table(plan.sites, console.width))
    for hint in plan.hints:
        click.echo(f"note: {hint}", err=True)
