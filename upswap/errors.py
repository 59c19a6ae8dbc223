"""What upswap raises: every error a user can meet is an `UpswapError` that says what to do next."""

from __future__ import annotations

from collections.abc import Mapping

from .shown import one_line

# As much of a line as anybody reads: a name in it may be as long as a file.
_LONGEST = 4_000


class _Lines:
    """A text of the given lines. It may be shown as it is: a name in it, from a file, can neither act on a terminal nor
    begin a line."""

    args: tuple[object, ...]

    def __init__(self, *lines: object) -> None:
        super().__init__(*(one_line(line, _LONGEST) for line in lines))

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


class UpswapError(_Lines, Exception):
    """Base class of every error upswap raises on purpose."""


class OptionError(UpswapError, ValueError):
    """An option has a value that cannot be used; the message lists the ones that can."""


class ShapeError(UpswapError, ValueError):
    """A tensor does not have the shape or type a site or an upsampler was made for."""


class InputError(UpswapError, ValueError):
    """No example input could be inferred, or the model does not run on the one given."""


class FilterError(UpswapError, ValueError):
    """An include or exclude pattern matches no site."""


class NothingToSwapError(UpswapError):
    """The model has no resize call that may be replaced under the given options."""


class PlanError(UpswapError, ValueError):
    """A Plan cannot be read, or does not fit the model it is applied to."""


class RewriteError(UpswapError):
    """A site that was to be replaced cannot be: by no route, or not faithfully."""


class SourceError(UpswapError):
    """A path or spec does not lead to a model."""


class UntrustedFileError(SourceError):
    """A file needs code outside the allow-list; the message names it and the flag that would allow it.

    `names` are those of the classes and functions that are not allowed, each with the reason, where it is they.
    """

    def __init__(self, *lines: object, names: Mapping[str, str] | None = None) -> None:
        super().__init__(*lines)
        self.names = dict(names or {})


class SaveError(UpswapError):
    """A file cannot be written."""


class ExportError(UpswapError):
    """A model cannot be exported, or its file does not compute what the model does."""


class VerificationError(UpswapError):
    """The patched model does not compute what the original computed."""


class UpswapWarning(_Lines, UserWarning):
    """Something a user should know that does not stop the work."""
