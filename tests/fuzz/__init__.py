"""Mutated files through `upswap.load`: `python -m tests.fuzz --files 12000`.

What must hold for each is in `guard.py`, how files are changed in `mutate.py`, what they are made from in `seeds.py`.
Every file follows from the seed and its number alone, so that any of them can be made again anywhere. (Hypothesis, which
the rest of the tests use, runs its examples inside one process; a file that kills or hangs the process has to be seen too.)
"""
