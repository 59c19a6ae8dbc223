"""What other tools' trainers, checkpoints and adapters need so that they keep the upsamplers: a file for each library.

Each imports its library, and is imported by nothing but the user and the command line.
"""
