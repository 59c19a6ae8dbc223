"""`upswap revert`: the original model back, with the weights its layers have now."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import common_options
from .output import progress, say_json, stdout

if TYPE_CHECKING:
    from torch import nn

    from ...files.weights import Weights


@click.command(short_help="Give a patched model its fixed upsampling back, with its trained weights.")
@click.argument("patched", metavar="PATCHED")
@click.option(
    "-o", "--output", metavar="OUT", help="File or folder to write.  [default: NAME.reverted.pt for NAME.upswap.pt]"
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@click.option(
    "--original", metavar="SOURCE", help="What builds the original, where PATCHED does not say: a file or a spec."
)
@click.option("--key", metavar="KEY", help="What to take of a checkpoint: ema, model.  [default: what fits]")
@common_options
def revert(
    patched: str,
    output: str | None,
    force: bool,
    original: str | None,
    key: str | None,
    trust: tuple[str, ...],
    as_json: bool,
) -> None:
    """Take the upsamplers out of PATCHED, a file or folder that upswap wrote, and save the original model.

    The weights of the host's layers are those in PATCHED, trained or not; those of the upsamplers are dropped. Of a state
    dict, the host's weights are saved under the names they have there; with --original, the model that they are of.
    """
    from ...console import words
    from ...files.host_weights import patched_weights
    from ...files.naming import reverted_name
    from ...files.paths import check_target

    target = Path(output) if output else reverted_name(Path(patched))
    check_target(target, source=patched, force=force)
    with progress("loading"):
        weights = patched_weights(patched, trust=trust, key=key)
        if weights is None:
            taken_out = _of_model(patched, original, key, trust)
        elif original is None:
            taken_out = _of_weights(weights, patched)
        else:
            taken_out = _of_weights_in(original, patched, key, trust)
    with progress(f"saving {target}"):
        saved = taken_out.save(target, force)
    result: dict[str, Any] = {
        "source": patched,
        "model": taken_out.model,
        "taken": taken_out.taken,
        "saved": str(saved),
        "upsamplers_removed": taken_out.upsamplers,
        "parameters_removed": taken_out.parameters,
    }
    if as_json:
        say_json(result)
        return
    console = stdout()
    count, dropped = taken_out.upsamplers, f"{taken_out.parameters:,} parameters dropped"
    name = (taken_out.model or "state dict").rpartition(".")[2]
    console.print(words((name, "bold"), f": {count} upsamplers taken out, {dropped}"))
    if taken_out.taken is not None:
        console.print(f"taken {taken_out.taken}", soft_wrap=True)
    console.print(f"saved {saved}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class _TakenOut:
    """What is left without the upsamplers: how it is saved, the class of the model if it is one, and what was dropped."""

    save: Callable[[Path, bool], Path]
    model: str | None
    taken: str | None
    upsamplers: int
    parameters: int


def _of_model(patched: str, original: str | None, key: str | None, trust: tuple[str, ...]) -> _TakenOut:
    from ... import api
    from ...errors import PlanError
    from ...surgery.apply import is_patched
    from ...training.groups import parameters, upsamplers

    model, spec, taken = _open(patched, original, key, trust)
    if not is_patched(model):
        raise PlanError(f"{patched} holds a {type(model).__name__} that is not patched: there is nothing to take out")
    count = len(upsamplers(model))
    dropped = sum(parameter.numel() for parameter in parameters(model))
    api.unpatch(model)
    return _TakenOut(_saving(model, spec or patched), _class_name(model), taken, count, dropped)


def _of_weights(weights: Weights, patched: str) -> _TakenOut:
    from ...files.host_weights import save_weights

    def save(target: Path, force: bool) -> Path:
        return save_weights(weights.host, target, source=patched, force=force)

    return _TakenOut(save, None, weights.taken, len(weights.upsamplers), weights.added_parameters)


def _of_weights_in(original: str, patched: str, key: str | None, trust: tuple[str, ...]) -> _TakenOut:
    from ...files.open_source import open_source
    from ...files.weights import load_weights

    opened = open_source(original, trust=trust)
    weights = load_weights(opened.model, patched, trust=trust, key=key)
    save = _saving(opened.model, opened.spec or patched)
    return _TakenOut(save, _class_name(opened.model), weights.taken, len(weights.upsamplers), weights.added_parameters)


def _saving(model: nn.Module, source: str) -> Callable[[Path, bool], Path]:
    from ...files.checkpoint import save

    return lambda target, force: save(model, target, source=source, force=force)


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _open(
    patched: str, original: str | None, key: str | None, trust: tuple[str, ...]
) -> tuple[nn.Module, str | None, str | None]:
    """The patched model, the spec that builds its original where one is known, and what was taken of the file."""
    from ...files.checkpoint import load_source, says_how_it_is_built, spec_in
    from ...files.open_source import open_source

    if original is None or says_how_it_is_built(patched, trust):
        model, taken = load_source(patched, trust=trust, key=key)
        return model, spec_in(patched), taken
    source = open_source(original, trust=trust)
    model, taken = load_source(patched, source.model, trust=trust, key=key)
    return model, source.spec, taken
