"""What a model is run on: inputs that were given, inferred or varied, and their description as plain data."""
