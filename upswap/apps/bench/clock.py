"""Times of several things, measured in turn so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

Key = TypeVar("Key")

# Calls that are shorter are repeated until they take so long together.
_SHORTEST = 2e-3
_WARM_UP = 3


def interleaved(
    calls: Mapping[Key, Callable[[], object]], repeats: int, device: torch.device
) -> dict[Key, list[float]]:
    """Seconds of one call of each, in each of `repeats` rounds; a round has all of them, in an order of its own."""
    numbers = {key: _number(call, device) for key, call in calls.items()}
    times: dict[Key, list[float]] = {key: [] for key in calls}
    order, shuffled = list(calls), random.Random(0)
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            shuffled.shuffle(order)
            for key in order:
                times[key].append(_seconds(calls[key], numbers[key], device))
    finally:
        if collects:
            gc.enable()
    return times


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median over the rounds of one's time as a multiple of the other's in the same round."""
    return quartiles(times, base)[1]


def quartiles(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of what `ratio` is the median of."""
    ratios = [a / b for a, b in zip(times, base, strict=True)]
    if len(ratios) == 1:
        return ratios[0], ratios[0], ratios[0]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return low, middle, high


def _number(call: Callable[[], object], device: torch.device) -> int:
    """Calls to time together, after a few to warm up."""
    for _ in range(_WARM_UP):
        call()
    return max(1, math.ceil(_SHORTEST / max(_seconds(call, 1, device), 1e-6)))


def _seconds(call: Callable[[], object], number: int, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(number):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3 / number
    before = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - before) / number
