"""From what was seen to a changed model, and back. The only room that changes a model.

`selection` and `planning` decide, `routes/` builds the new methods, `trial` runs them with the original resize as stand-in.
`apply` puts them in and takes them out, `rewritten_class` is the subclass and its pickling. `replay` carries out a plan made
before, `checking/` compares patched with original.

A new way to rewrite a forward is a file in `routes/`. It must be right for every input, or raise.

`restore` is the one function that a pickle of a patched model names. Its address here is part of the file format.
"""

from .rewritten_class import restore as restore

# A pickle writes the address it finds on the function, and files outlive the file it stands in.
restore.__module__ = __name__
