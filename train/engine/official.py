"""Stub until the branch lands."""


def parse_quirks(text: str) -> frozenset[str]:
    return frozenset()
