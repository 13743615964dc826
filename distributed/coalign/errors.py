"""The one exception of our own. Every module may raise it; only process.run_step catches it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that the user can mend: printed as one line on stderr, exit code 2."""
