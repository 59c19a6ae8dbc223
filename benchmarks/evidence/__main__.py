"""Does an upsampler pay in fine-tuning a model that is trained already? A row for every arm, seed and rate.

    python benchmarks/evidence run --data landcover --host fpn --arm unpatched --arm dysample-lp --seed 0 --lr 1e-3
    python benchmarks/evidence table rows.jsonl

A row that its file has already is not measured again, so that a run goes on where it was stopped. Every arm of a seed begins
with the same weights, those of a host that was trained first and is kept in --folder, and sees the same images in the same
order. PLAN.md says how rows are judged. It was written before they were measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

import click
import hosts
import torch

import data as data_sets
import upswap
from training import Recipe, evaluate, train


@click.group()
def evidence() -> None:
    """Measure fine-tuning with and without learned upsamplers."""


_DEFAULT_FOLDER = Path.home() / ".cache" / "upswap-evidence"


@evidence.command()
@click.option("--data", "names", type=click.Choice(["landcover", "camvid", "shapes"]), multiple=True, required=True)
@click.option("--host", "models", type=click.Choice(list(hosts.HOSTS)), multiple=True, required=True)
@click.option("--arm", "arms", type=click.Choice(list(hosts.ARMS)), multiple=True, required=True)
@click.option("--seed", "seeds", type=click.IntRange(min=0), multiple=True, default=(0,), show_default=True)
@click.option("--lr", "rates", type=float, multiple=True, default=(1e-3,), show_default=True, help="Of the host.")
@click.option("--mult", "mults", type=float, multiple=True, help="The upsamplers' rate over it.  [default: upswap's]")
@click.option("--steps", type=click.IntRange(min=1), multiple=True, default=(600,), show_default=True)
@click.option("--optimizer", "optimizers", type=click.Choice(["adamw", "sgd"]), multiple=True, default=("adamw",))
@click.option("--host-steps", type=click.IntRange(min=1), default=4000, show_default=True)
@click.option("--host-lr", type=float, default=3e-3, show_default=True)
@click.option(
    "--side", type=click.IntRange(min=32), default=96, show_default=True, help="Of training's crops, in pixels."
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), default=_DEFAULT_FOLDER, help="For data and trained hosts.")
@click.option("--camvid", type=click.Path(path_type=Path, exists=True), help="Your copy of CamVid.")
@click.option("--rows", type=click.Path(path_type=Path), default=Path("rows.jsonl"), show_default=True)
def run(**given: Any) -> None:
    """Measure rows, of all combinations of what is given."""
    torch.set_num_threads(given["threads"])
    known = (
        {_key(json.loads(line)) for line in given["rows"].read_text().splitlines()} if given["rows"].exists() else set()
    )
    combinations = itertools.product(
        given["names"],
        given["models"],
        given["seeds"],
        given["steps"],
        given["optimizers"],
        given["rates"],
        given["mults"] or (None,),
        given["arms"],
    )
    for name, host, seed, steps, optimizer, lr, mult, arm in combinations:
        if mult is not None and hosts.ARMS[arm].options is None:
            mult = None  # there is nothing that it could be the rate of
        recipe = Recipe(steps, lr, seed, given["side"], optimizer=optimizer, upsampler_lr_mult=mult)
        row = {"data": name, "host": host, "arm": arm, **recipe._asdict(), "host_steps": given["host_steps"]}
        row["host_lr"] = given["host_lr"]
        if _key(row) not in known:
            known.add(_key(row))
            found = _measured(row, recipe, data_sets.load(name, given["folder"], given["camvid"]), given["folder"])
            with given["rows"].open("a") as file:
                file.write(json.dumps({**row, **found}) + "\n")
            click.echo(f"{name} {host} {arm} seed {seed} lr {lr:g}: mIoU {found['test']['miou']:.2f}", err=True)


#: What tells one row from another.
_IDENTITY = ("data", "host", "arm", *Recipe._fields, "host_steps", "host_lr")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _IDENTITY)


def _measured(row: dict[str, Any], recipe: Recipe, data: data_sets.Data, folder: Path) -> dict[str, Any]:
    arm = hosts.ARMS[row["arm"]]
    model = _host(row, recipe, data, folder, trained=not arm.from_scratch)
    hosts.patched(model, arm, recipe.side)
    longer = recipe._replace(steps=recipe.steps + row["host_steps"], lr=row["host_lr"]) if arm.from_scratch else recipe
    began = time.perf_counter()
    losses = train(model, data.splits["train"], longer)
    found: dict[str, Any] = {"seconds": round(time.perf_counter() - began, 1)}
    found["loss"] = sum(losses[-50:]) / len(losses[-50:])
    for split in ("val", "test"):
        found[split] = evaluate(model, data.splits[split], data.classes)
    if upswap.is_patched(model):
        images = data.splits["val"].images[:8, :, : recipe.side, : recipe.side].float() / 255
        found["offsets"] = [dataclasses.asdict(moved) for moved in upswap.offsets(model, images).rows]
    return {**found, "upswap": upswap.__version__, "torch": torch.__version__}


def _host(row: dict[str, Any], recipe: Recipe, data: data_sets.Data, folder: Path, *, trained: bool) -> torch.nn.Module:
    """The host of a seed, and with `trained` as its own training left it, which is kept."""
    torch.manual_seed(recipe.seed)
    model = hosts.HOSTS[row["host"]](data.classes)
    if not trained:
        return model
    steps, lr = row["host_steps"], row["host_lr"]
    kept = folder / f"{data.name}-{row['host']}-{recipe.side}px-{steps}x{lr:g}-seed{recipe.seed}.pt"
    if not kept.exists():
        # Of another order than any arm's.
        losses = train(model, data.splits["train"], Recipe(steps, lr, 10_000 + recipe.seed, recipe.side))
        found = {split: evaluate(model, data.splits[split], data.classes) for split in ("val", "test")}
        click.echo(f"{kept.stem}: loss {sum(losses[-50:]) / 50:.3f}, mIoU {found['test']['miou']:.2f}", err=True)
        part = kept.with_suffix(".part")
        torch.save({"state": model.state_dict(), **found}, part)
        part.replace(kept)
    model.load_state_dict(torch.load(kept)["state"])
    return model


@evidence.command()
@click.argument("rows", type=click.Path(path_type=Path, exists=True))
@click.option("--control", type=click.Choice(list(hosts.ARMS)), default="unpatched", show_default=True)
def table(rows: Path, control: str) -> None:
    """Print the tables of docs/evidence.md."""
    from judging import tables

    click.echo(tables([json.loads(line) for line in rows.read_text().splitlines()], control))


if __name__ == "__main__":
    sys.exit(evidence())
