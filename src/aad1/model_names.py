"""What a model may be called by: a packaged name, a folder or file, or a hub id."""

from __future__ import annotations

import difflib
from pathlib import Path

from aad1.errors import UserError
from aad1.model_info import INDEX

PACKAGED = Path(__file__).parent / "packaged"


def packaged_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(p.parent.name for p in PACKAGED.glob(f"*/{INDEX}"))


def find_model(name: str | Path) -> Path:
    """The folder of a packaged name, a folder, or a hub id (downloaded).

    UserError suggests the nearest packaged name.
    """
    if (Path(name) / INDEX).exists():
        return Path(name)
    if str(name) in packaged_models():
        return PACKAGED / str(name)
    if Path(name).exists():
        return Path(name)  # whoever opens it says what is missing
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "out/")):
        return _from_hub(str(name))
    near = difflib.get_close_matches(str(name), packaged_models(), n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(
        f"no model {str(name)!r}{hint} Packaged: {', '.join(packaged_models()) or 'none'}; "
        "or give a folder, or a hub id owner/name"
    )


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{name!r} is no folder and could not be fetched from the hub: {line}"
        ) from None
