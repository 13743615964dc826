"""The one exception of our own. Every module may raise it; recipe.run_step turns it into an exit status."""

from __future__ import annotations


class UserError(Exception):
    """Invalid input or settings, which the user can fix: printed as one line on stderr, exit status 2."""
