"""Operators of our own."""


def register() -> None:
    """Register our operators with PyTorch."""
