"""Upsamplers that sum a neighbourhood of each output pixel, with weights that they predict.

One file for each published operator. `base` has what they share: how they are called, and the gain by which they start at the
original resize. The sums themselves are `nn/sampling/reassembly.py`.
"""
