"""The browser that the page's tests use. As a script: a line that says so if there is none."""

from __future__ import annotations

import shutil

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_browser() -> str | None:
    """Path of an installed Chromium or Chrome."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


if __name__ == "__main__" and find_browser() is None:
    print(f"The page's tests were skipped: no browser was found ({', '.join(NAMES)})")
