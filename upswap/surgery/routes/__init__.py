"""The three ways to rewrite a module's forward: module, graph and source, and the choice of the first faithful one.

`graph.py` edits an FX trace, `source.py` with `recompile.py` rewrites the call expressions in source text. `runtime.py` is what
rewritten code calls.
"""
