"""What each training tool does with upsamplers, a row a tool and a column a step; every cell is shown by tests.

    python benchmarks/trainers.py [--tool lightning] [--json]

"ok": the tests of `tests/integrations` that the cell names passed, the slow ones among them. "limit" is the tool's own, told
below the table with what upswap says of it; a test shows it too. "-" is a step that the tool does not have. Exits with 1 where a
test fails, or names none that exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = "tests/integrations"
STEPS = ("train", "EMA", "checkpoint", "resume", "fine-tune again", "reload", "predict", "export", "patched late")


@dataclasses.dataclass(frozen=True)
class Cell:
    """The test functions that show a cell, and the tool's own limit where it has one."""

    tests: tuple[str, ...]
    limit: str = ""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A row: a file of tests, and what of it shows which steps."""

    name: str
    file: str
    cells: dict[str, Cell]


def row(name: str, file: str, *shown: tuple[str, str], **limits: str) -> Tool:
    """A tool of (steps, tests), both with commas between; `limits` by step, with "_" for spaces."""
    cells: dict[str, Cell] = {}
    for steps, tests in shown:
        for step in steps.split(", "):
            before = cells[step].tests if step in cells else ()
            cells[step] = Cell((*before, *tests.split(", ")), limits.get(step.replace(" ", "_").replace("-", "_"), ""))
    return Tool(name, file, cells)


def tools() -> list[Tool]:
    """The matrix."""
    return [
        row(
            "ultralytics",
            "test_ultralytics.py",
            (
                "train, EMA, checkpoint",
                "test_a_plain_training_keeps_the_upsamplers_everywhere, test_every_family_and_task",
            ),
            ("resume", "test_a_killed_training_goes_on_where_it_stopped"),
            ("fine-tune again", "test_a_second_fine_tuning_starts_from_the_trained_values"),
            ("reload, predict, export", "test_best_pt_predicts_validates_and_exports_in_a_fresh_process"),
            ("reload, predict, export", "test_converted_checkpoints_are_what_yolo_opens"),
        ),
        row(
            "transformers",
            "test_transformers.py",
            ("train, checkpoint, resume, fine-tune again, predict", "test_a_plain_trainer"),
            ("checkpoint", "test_the_best_model_at_the_end"),
            (
                "reload",
                "test_what_save_pretrained_wrote_comes_back_in_every_way, test_every_way_that_upswap_reads_it, "
                "test_without_the_call_it_is_the_original_which_says_so_when_it_is_patched",
            ),
            reload="from_pretrained says that the keys are unexpected, unless integrations.transformers.enable() was called",
        ),
        row(
            "accelerate",
            "test_accelerate.py",
            ("train, checkpoint, resume, reload, predict", "test_trained_saved_and_taken_up_again"),
        ),
        row(
            "PEFT",
            "test_peft.py",
            ("train, checkpoint, reload, predict", "test_an_adapter_has_the_upsamplers"),
            ("patched late", "test_without_it_training_says_that_they_are_frozen"),
            ("reload", "test_an_adapter_file_on_a_base_that_is_not_patched"),
            reload="PEFT drops an adapter's upsamplers on a base that is not patched",
        ),
        row(
            "Lightning",
            "test_lightning.py",
            (
                "train, checkpoint, resume, fine-tune again, reload, predict",
                "test_train_checkpoint_resume_reload_predict",
            ),
            ("resume, predict", "test_a_checkpoint_goes_into_a_module_that_is_not_patched_yet"),
            ("checkpoint", "test_checkpoints_of_weights_alone_have_the_plan"),
            ("reload", "test_a_checkpoint_without_the_plan_says_what_to_do, test_a_module_that_is_patched_itself"),
            ("EMA", "test_averaged_weights, test_averages_made_before_the_patch_are_an_error_before_the_first_step"),
            ("export", "test_export_of_a_trained_module"),
            (
                "patched late",
                "test_patched_too_late_is_an_error_before_the_first_step, test_patched_too_late_is_said_without_the_callback_too",
            ),
        ),
        row(
            "timm",
            "test_timm.py",
            (
                "train",
                "test_the_optimiser_has_the_upsamplers, test_layer_decay_counts_an_upsampler_to_the_layer_it_stands_in",
            ),
            (
                "train, EMA, checkpoint, resume, fine-tune again, reload, predict",
                "test_train_average_checkpoint_resume_reload",
            ),
            ("reload", "test_a_model_that_is_not_patched_refuses_the_checkpoint"),
            ("export", "test_export_of_what_was_reloaded"),
            ("patched late", "test_averages_made_before_the_patch"),
            reload="load_checkpoint(strict=False) drops what the model does not know; strict, the default, it raises",
        ),
        row(
            "MMEngine",
            "test_mmengine.py",
            ("train, checkpoint, resume, reload, predict", "test_train_checkpoint_resume_reload"),
            ("train", "test_rates_by_name, test_initialisation_leaves_upsamplers_alone"),
            ("EMA", "test_averaged_weights"),
            ("fine-tune again", "test_a_second_fine_tuning_starts_from_what_was_trained"),
            ("resume, fine-tune again", "test_a_model_that_is_not_patched_does_not_lose_them"),
            ("reload", "test_what_mmengine_says_without_the_hook"),
            ("patched late", "test_patched_too_late_is_an_error_before_the_first_step"),
            ("export", "test_export_of_a_trained_model"),
            reload="load_checkpoint(strict=False), its default, names what it drops in its log alone; UpswapHook raises",
        ),
        row(
            "torchvision references",
            "test_torch.py",
            (
                "train, EMA, checkpoint, resume, fine-tune again, reload, predict",
                "test_the_steps_of_torchvisions_references",
            ),
            ("export", "test_pt2e_leaves_upsamplers_float"),
            ("patched late", "test_averages_made_before_the_patch_are_told"),
        ),
        row(
            "DDP",
            "test_torch.py",
            ("train, checkpoint, reload, predict, patched late", "test_distributed_data_parallel"),
        ),
        row("FSDP2", "test_torch.py", ("train, checkpoint, reload, predict, patched late", "test_fully_shard")),
        row("SyncBatchNorm", "test_torch.py", ("train, predict", "test_sync_batch_norm")),
        row(
            "torch.compile",
            "test_torch.py",
            ("train, checkpoint, reload", "test_a_compiled_step_trains_them"),
            ("patched late", "test_a_compiled_model_is_not_patched"),
        ),
        row(
            "QAT by FX, eager",
            "test_torch.py",
            (
                "train, predict, export",
                "test_qat_by_fx_leaves_upsamplers_float, test_eager_qat_leaves_upsamplers_float",
            ),
            export="eager quantisation puts no stubs around a float module: it raises without them",
        ),
        row(
            "SMP",
            "test_smp.py",
            (
                "train, checkpoint, resume, fine-tune again, reload, predict, export",
                "test_what_save_pretrained_wrote_comes_back",
            ),
            ("reload", "test_smp_itself_is_loud_unless_it_is_told_not_to_be"),
            reload="smp.from_pretrained(strict=False) drops what it does not know; strict, the default, it raises",
        ),
        row("PT2E", "test_torch.py", ("train, predict, export", "test_pt2e_leaves_upsamplers_float")),
    ]


def outcomes(files: Iterable[str]) -> dict[tuple[str, str], set[str]]:
    """What became of each test function of the files, once for each of its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", "slow or not slow", f"--junitxml={report}"]
        subprocess.run([*command, *files], cwd=ROOT, check=False, stdout=sys.stderr)
        found: dict[tuple[str, str], set[str]] = {}
        for case in ET.parse(report).iter("testcase"):
            bad = any(child.tag in ("failure", "error") for child in case)
            outcome = "failed" if bad else "skipped" if case.find("skipped") is not None else "passed"
            file = f"{case.get('classname', '').rpartition('.')[2]}.py"
            found.setdefault((file, str(case.get("name")).partition("[")[0]), set()).add(outcome)
        return found


def said(tool: Tool, step: str, found: dict[tuple[str, str], set[str]]) -> str:
    """What stands in a cell."""
    cell = tool.cells.get(step)
    if cell is None:
        return "-"
    bad = [test for test in cell.tests if found.get((tool.file, test)) != {"passed"}]
    return f"FAILED {', '.join(bad)}" if bad else "ok, limit" if cell.limit else "ok"


def main() -> int:
    """Run the tests of the tools asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", help="only tools whose name has this in it; may be given again")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    chosen = [t for t in tools() if not asked.tool or any(part.lower() in t.name.lower() for part in asked.tool)]
    found = outcomes(sorted({f"{FOLDER}/{tool.file}" for tool in chosen}))
    table = {tool.name: {step: said(tool, step, found) for step in STEPS} for tool in chosen}
    limits = {f"{t.name}, {step}": cell.limit for t in chosen for step, cell in t.cells.items() if cell.limit}
    if asked.json:
        print(json.dumps({"cells": table, "limits": limits}, indent=2))
    else:
        width = max(map(len, table)) + 2
        print(" " * width + "".join(f"{step:<17}" for step in STEPS))
        for name, cells in table.items():
            print(
                f"{name:<{width}}"
                + "".join(f"{text.split(' ')[0] if 'FAILED' in text else text:<17}" for text in cells.values())
            )
        for name, limit in limits.items():
            print(f"\n{name}: {limit}", end="")
        print()
        for name, cells in table.items():
            for step, text in cells.items():
                if text.startswith("FAILED"):
                    print(f"{name}, {step}: {text}")
    return int(any(text.startswith("FAILED") for cells in table.values() for text in cells.values()))


if __name__ == "__main__":
    sys.exit(main())
