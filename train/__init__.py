"""Stage 2: rows to policies. One file holds one objective and the command that trains with it."""
