"""What a release of torch cannot do, whoever asks."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def skip_where_export_ties_sizes(scale: Any) -> None:
    """Before 2.13 an export ties sizes that are left open to each other, where a ratio is another on each axis."""
    if torch.__version__ < (2, 13) and isinstance(scale, tuple) and scale[0] != scale[1]:
        pytest.skip(f"torch.export of a ratio {scale} ties open sizes before torch 2.13; this is {torch.__version__}")
