"""What other tools' trainers, checkpoints and adapters need so that they keep the upsamplers: a file for each library.

Each imports its library. `import upswap` imports none of them: the user does, the command line, the library's own entry point, or
the patch of a model of a library whose trainers need it.
"""

#: The modules here that have a class `Mark`, of which every patched model carries an object whose class is of that package.
MARKING = {"ultralytics": "upswap.integrations.ultralytics"}
