"""One torch thread a test process: pytest-xdist runs a process on every core, and more threads only wait for each other."""

import torch

torch.set_num_threads(1)
