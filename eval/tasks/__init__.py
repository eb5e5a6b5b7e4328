"""Reasoning benchmarks as lm-eval tasks: one YAML each, their documents (docs.py) and their scoring (scoring.py)."""
