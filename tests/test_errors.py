"""An error's text can be shown whatever names are in it, and read."""

from __future__ import annotations

import pickle

import pytest

import upswap


def test_names_from_a_file_act_on_no_terminal_and_begin_no_line() -> None:
    error = upswap.SourceError("a\x1b[31m\nnote: all is well", "second line")
    assert str(error) == "a\\x1b[31m\\nnote: all is well\nsecond line"


def test_a_line_is_no_longer_than_anybody_reads() -> None:
    assert len(str(upswap.SourceError("x" * 100_000))) < 5_000


@pytest.mark.parametrize("kind", [upswap.OptionError, upswap.PlanError, upswap.SaveError])
def test_errors_reach_another_process_as_they_are(kind: type[upswap.UpswapError]) -> None:
    again = pickle.loads(pickle.dumps(kind("one", "two")))
    assert type(again) is kind
    assert str(again) == "one\ntwo"
