"""Models in files and folders.

`checkpoint` is the one door. `formats/` has one file a form, `safety/` decides what a stranger's file may name, call and
allocate, `atomic` writes whole files. Plans are carried out through `surgery`, never through `api`. A new form is a file in
`formats/`. Whatever `safety/` admits has a test of what a hostile file makes of it.
"""
