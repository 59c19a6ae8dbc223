"""A patched model against its original: every output compared, and the place where two begin to differ."""
