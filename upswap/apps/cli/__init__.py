"""The `upswap` command: the group, and what becomes of errors.

Nothing here or in the command files imports torch before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

import click

from ..._version import __version__
from ...errors import FilterError, NothingToSwapError, OptionError, UpswapError, UpswapWarning
from .bench import bench
from .convert import convert
from .export import export
from .inspect_ import inspect
from .output import say, say_json, tell_error
from .revert import revert
from .verify import verify
from .yaml_ import yaml
from .zoo import zoo

EXIT_CODES = """
\b
Exit codes:
  0  done
  1  an error, or a model that is not the same at step 0
  2  a wrong command line, option or pattern
  3  nothing to swap
"""

# Python's own convention for a process stopped by Ctrl-C.
_INTERRUPTED = 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EXIT_CODES)
@click.version_option(__version__, prog_name="upswap")
def cli() -> None:
    """Swap a model's fixed upsampling for learned upsampling, with nothing changed at step 0."""


cli.add_command(inspect)
cli.add_command(convert)
cli.add_command(verify)
cli.add_command(export)
cli.add_command(revert)
cli.add_command(yaml)
cli.add_command(zoo)
cli.add_command(bench)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line `args` (`sys.argv` by default) and exit with its code."""
    sys.exit(run(list(sys.argv[1:] if args is None else args)))


def run(args: list[str]) -> int:
    """Run a command line and return its exit code; every error has been told by then.

    `--json` and `--debug` are looked for in `args` itself: they also say how to report a command line that is wrong.
    """
    debug, as_json = "--debug" in args, "--json" in args
    with warnings.catch_warnings():
        warnings.simplefilter("default" if debug else "ignore")
        warnings.simplefilter("always", UpswapWarning)
        warnings.showwarning = _show_warning
        try:
            return _code(cli.main(args, prog_name="upswap", standalone_mode=False))
        except click.exceptions.NoArgsIsHelpError as error:
            say(error.format_message(), err=True)
            return error.exit_code
        except click.ClickException as error:
            if as_json:
                return _tell(error, error.format_message(), error.exit_code, as_json, debug)
            told = io.StringIO()
            error.show(told)
            say(told.getvalue().rstrip(), err=True)
            return error.exit_code
        except click.Abort:
            say("interrupted", err=True)
            return _INTERRUPTED
        except UpswapError as error:
            return _tell(error, str(error), _exit_code(error), as_json, debug)
        except BrokenPipeError:
            # The reader of a pipe (`| head`) has enough. Python would complain once more when it closes stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:  # noqa: BLE001 - the promise is one message, whatever broke
            hint = "This is a bug in upswap or in the model; --debug shows where it happened"
            return _tell(error, f"{type(error).__name__}: {error}\n{hint}", 1, as_json, debug)


def _exit_code(error: UpswapError) -> int:
    if isinstance(error, NothingToSwapError):
        return 3
    return 2 if isinstance(error, OptionError | FilterError) else 1


def _code(result: Any) -> int:
    """Commands return nothing; click turns an early exit (`--help`) into its code."""
    return result if isinstance(result, int) else 0


def _tell(error: Exception, text: str, code: int, as_json: bool, debug: bool) -> int:
    if debug:
        say("".join(traceback.format_exception(error)), err=True)
    if as_json:
        say_json({"error": text, "type": type(error).__name__}, indent=None)
    else:
        tell_error(text)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Notes for people, on stderr; with `--debug` others' warnings too, with their place."""
    place = "" if issubclass(category, UpswapWarning) else f"{filename}:{lineno}: {category.__name__}: "
    say(f"note: {place}{message}", err=True)
