"""`upswap inspect`: what a model's resize calls are, and what `convert` would do about each."""

from __future__ import annotations

from typing import Any

import click

from .options import model_options, open_model, patch_options
from .output import note, progress, say_json, stdout


@click.command(short_help="List a model's resize calls and what would be done about each.")
@model_options
def inspect(**options: Any) -> None:
    """List the resize calls of SOURCE and what `convert` would do about each.

    SOURCE is a file (.pt, .safetensors) or a spec: smp:unet?encoder_name=resnet34&classes=3, timm:NAME,
    torchvision:NAME, hf:FOLDER (a model folder of transformers or SMP), python:package.module:factory.
    """
    from ... import api
    from ...console import words
    from ...files.reading import plan_alone
    from ...plan.table import sites_table
    from ...surgery.options import check_same_options

    with progress("looking at the model"):
        given = patch_options(options, given_only=True)
        plan = plan_alone(options["source"])
        if plan is None:
            source, example_inputs = open_model(options)
            plan = api.inspect(source.model, example_inputs, **given)
        else:
            check_same_options(plan, given, options["source"], alone=True)
    if options["as_json"]:
        say_json(plan.to_dict())
        return
    console = stdout()
    console.print(words((plan.model_class.rpartition(".")[2], "bold"), f": {plan.summary}"))
    if plan.sites:
        console.print()
        console.print(sites_table(plan.sites, console.width))
    for hint in plan.hints:
        note(hint)
