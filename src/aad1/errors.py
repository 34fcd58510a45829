"""Errors that are the user's to mend: one line that names the value and what is allowed."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in what the user gave (a file, a flag, a config); the CLI prints it and exits 2."""
