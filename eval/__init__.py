"""Stage 3: policies to scores, tables and figures."""
