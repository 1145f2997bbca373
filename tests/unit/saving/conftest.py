"""The synthetic states of the checkpoint tests."""

from tests.unit.checkpoint.conftest import synthetic

__all__ = ["synthetic"]
