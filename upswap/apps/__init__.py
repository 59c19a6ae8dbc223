"""What people start: `cli/` (one file a command), `zoo/` (many models, processes, reports), `bench/` (measuring).

Nothing outside this room may import it.
"""
