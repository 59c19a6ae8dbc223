"""A patched model in training: what is trained at which rate, whether nothing is lost, and the comparison without the swap.

`status` says of every upsampler what became of it. `groups` makes an optimiser's groups, `switch` turns the upsamplers off for
a while. Everything here sees through what a model is wrapped in: it finds the patched models inside.
"""
