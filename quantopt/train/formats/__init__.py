"""Reads the images of a source, in whatever of the formats it is. See `quantopt.train.data` for what is recognised."""

from quantopt.train.formats.recognise import read

__all__ = ["read"]
