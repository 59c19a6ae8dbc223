"""Runs a model, without leaving a trace, and reports every resize call.

It says who makes the call, where in the source, on what shapes, and what for. Nothing here knows an upsampler or changes a
model. A new way to call a resize belongs here, in `resize_calls` and `callsites/`. What a run changes has to be put back.
"""
