"""Doctests are looked for in the package too, where some modules can only be imported where their library is."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["upswap/nn/sampling/triton_kernels.py"]
collect_ignore += [
    f"upswap/integrations/{library}.py"
    for library in ("lightning", "mmengine")
    if not importlib.util.find_spec(library)
]
