"""Consistency alignment: make a language model answer the same however you ask."""

__version__ = "0.1.0"
