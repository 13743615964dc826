"""Exceptions of our own. Every module may raise UserError; recipe.run_step turns it into an exit status."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input or settings, which the user can fix: printed as one line on stderr, exit status 2."""


class MalformedError(ValueError):
    """A value in a file of ours that is not what its field declares. A reader adds the file and raises UserError."""
