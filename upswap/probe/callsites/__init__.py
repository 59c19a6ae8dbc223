"""Where in the code a call stands: from the Python stack and source text to a `Location`, and back.

`location.py` reads and finds Locations. `stack.py` walks the Python stack, `syntax.py` reads source text. Nothing here runs a
model.
"""
