"""The operators: checks of arguments and dispatch, one operation per file; library.py has the schemas and fakes."""

from quantopt.ops import library

__all__ = ["library"]
