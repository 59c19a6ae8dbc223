"""Why a module cannot be rewritten, or no longer fits its plan, as errors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from ...errors import PlanError, RewriteError

#: More than any model has.
_MOST_NAMED = 100


def does_not_fit(what: str, causes: Mapping[str, str]) -> PlanError:
    """The error for sites that are not as a Plan knew them, with the cause of each; a stranger's plan may have thousands."""
    lines = [f"  {name}: {cause}" for name, cause in itertools.islice(causes.items(), _MOST_NAMED)]
    if len(causes) > _MOST_NAMED:
        lines.append(f"  and {len(causes) - _MOST_NAMED} more")
    return PlanError(
        f"{what}. Install the version of their library that they were patched with, or patch the model anew:",
        *lines,
    )


class Misfit(RewriteError):
    """An owner is not as a Plan made before knew it; `causes` has the sites that do not fit."""

    def __init__(self, causes: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name}: {cause}" for name, cause in causes.items()))
        self.causes = dict(causes)


class NotFaithful(RewriteError):
    """The owner's forward does not reduce to one graph that is right for every input."""
