"""Doctests are looked for in the package too, where one module can only be imported where there is a triton."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("triton") else ["upswap/nn/sampling/triton_kernels.py"]
