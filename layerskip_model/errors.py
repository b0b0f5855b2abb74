"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a recipe, a flag or an input file.

    The message is one line that names the thing, its value and the fix. Entry points print it to
    standard error and exit with status 2; everything else lets it pass.
    """
