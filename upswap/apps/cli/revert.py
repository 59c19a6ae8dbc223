"""`upswap revert`: the original model back, with the weights its layers have now."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import common_options
from .tables import progress, say_json, stdout

if TYPE_CHECKING:
    from torch import nn


@click.command(short_help="Give a patched model its fixed upsampling back, with its trained weights.")
@click.argument("patched", metavar="PATCHED")
@click.option(
    "-o", "--output", metavar="OUT", help="File or folder to write.  [default: NAME.reverted.pt for NAME.upswap.pt]"
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--original", metavar="SOURCE", help="What builds the original, where PATCHED does not say: a file or a spec."
)
@common_options
def revert(
    patched: str, output: str | None, force: bool, original: str | None, trust: tuple[str, ...], as_json: bool
) -> None:
    """Take the upsamplers out of PATCHED, a file or folder that upswap wrote, and save the original model.

    The weights of the host's layers are those in PATCHED, trained or not; those of the upsamplers are dropped.
    """
    from ... import api
    from ...console import words
    from ...errors import PlanError
    from ...files import checkpoint
    from ...files.naming import reverted_name
    from ...surgery.apply import is_patched

    target = Path(output) if output else reverted_name(Path(patched))
    checkpoint.check_target(target, source=patched, force=force)
    with progress("loading"):
        model, spec = _open(patched, original, trust)
    if not is_patched(model):
        raise PlanError(f"{patched} holds a {type(model).__name__} that is not patched: there is nothing to take out")
    count = len(api.upsamplers(model))
    dropped = sum(parameter.numel() for parameter in api.parameters(model))
    api.unpatch(model)
    with progress(f"saving {target}"):
        saved = checkpoint.save(model, target, source=spec or patched, force=force)
    result: dict[str, Any] = {
        "source": patched,
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "saved": str(saved),
        "upsamplers_removed": count,
        "parameters_removed": dropped,
    }
    if as_json:
        say_json(result)
        return
    console = stdout()
    console.print(
        words((type(model).__name__, "bold"), f": {count} upsamplers taken out, {dropped:,} parameters dropped")
    )
    console.print(f"saved {saved}", soft_wrap=True)


def _open(patched: str, original: str | None, trust: tuple[str, ...]) -> tuple[nn.Module, str | None]:
    """The patched model, and the spec that builds its original where one is known."""
    from ...files.checkpoint import load, says_how_it_is_built, spec_in
    from ...files.open_source import open_source

    if original is None or says_how_it_is_built(patched, trust):
        return load(patched, trust=trust), spec_in(patched)
    source = open_source(original, trust=trust)
    return load(patched, source.model, trust=trust), source.spec
