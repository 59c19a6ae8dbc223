"""`upswap yaml`: the YAML of a model of ultralytics, with its upsamplers as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import common_options, patch_options, patching_options
from .output import note, progress, say, say_json, stdout


@click.command("yaml", short_help="Write a YOLO's YAML with upsamplers as rows.")
@click.argument("source", metavar="SOURCE")
@click.option("-o", "--output", metavar="OUT", help="The YAML to write.  [default: NAME-dysample.yaml]")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@patching_options
@common_options
def yaml(source: str, output: str | None, force: bool, as_json: bool, **options: Any) -> None:
    """Write the YAML of a model of ultralytics, SOURCE, with DySample in place of its nn.Upsample rows.

    SOURCE is a file, or a name that ultralytics has, such as yolov8n.yaml. The number of channels is left to ultralytics, so
    that all scales of a model can be built from OUT. What is built is checked to compute the same.
    """
    from ...console import words
    from ...errors import OptionError

    target = Path(output or f"{Path(source).stem}-dysample.yaml")
    try:
        from ...integrations import ultralytics_yaml
    except ModuleNotFoundError as error:
        raise OptionError(f"upswap yaml needs ultralytics ({error}): pip install ultralytics") from error
    with progress("looking at the model"):
        done = ultralytics_yaml.write(
            source, target, input_size=options["input_size"], force=force, **patch_options(options, given_only=True)
        )
    if as_json:
        say_json(
            {
                "source": source,
                "saved": str(done.path),
                "rows": list(done.rows),
                "max_rel_diff": done.report.max_rel_diff,
                "notes": list(done.notes),
            }
        )
        return
    console = stdout()
    console.print(words((done.path.name, "bold"), f": DySample in the rows {', '.join(map(str, done.rows))}"))
    console.print(f"step-0 difference  {done.report.max_rel_diff:.1e} of the largest output")
    console.print(f"saved              {done.path}\n", soft_wrap=True)
    console.print("In Python:\n")
    say(
        "    from ultralytics import YOLO\n    import upswap.integrations.ultralytics as u\n    u.register()\n"
        f"    model = YOLO({str(done.path)!r})"
    )
    for text in done.notes:
        note(text)
