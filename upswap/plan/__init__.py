"""The words every other room speaks: `Site`, `Options`, `Plan`, and their JSON.

A Site is one resize call and what was decided about it. A Plan is all of them with the options. They are frozen dataclasses,
and every rule stands beside its field. You may add a field with a default. Nothing here imports torch or computes anything
about a model.
"""
