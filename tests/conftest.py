"""One torch thread a test process: pytest-xdist runs a process on every core, and more threads only wait for each other."""

import torch

torch.set_num_threads(1)

#: No tests in these: looked through for doctests they would be imported a second time, under another name.
collect_ignore_glob = [
    "support/*",
    "libraries/zoos/*",
]
