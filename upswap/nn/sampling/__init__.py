"""Where a pixel of the output reads, and reading it: functions of tensors only.

Positions, the sampler with its backward, the CPU gather, the compiled code for CPUs, the Triton kernels, memory
formats. Nothing here knows a module, a model or a plan.
"""
