"""Where directories go whose paths have to be short."""

from __future__ import annotations

import tempfile

# Unix socket paths end at 107 characters, and Ray appends some 60 to its directory.
_MAX_CHARS = 30


def short_base() -> str:
    """The directory for temporary files, or /tmp where that is too long."""
    base = tempfile.gettempdir()
    return base if len(base) <= _MAX_CHARS else "/tmp"
