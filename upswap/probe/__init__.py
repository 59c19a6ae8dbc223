"""Runs a model once or twice, without leaving a trace, and reports every resize call.

It says who makes the call, where in the source, on what shapes, and what for. Nothing here knows an upsampler or changes a
model.
"""
