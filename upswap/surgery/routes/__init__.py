"""The three ways to rewrite a module's forward: module, graph and source, and the choice of the first faithful one.

`graph_route.py` edits an FX trace. `source_route.py` groups the call expressions of an owner by function, and `rewrite_calls.py`
rewrites them. `runtime.py` is what rewritten code calls. `scriptable.py` has the text that `torch.jit.script` gets.
"""
