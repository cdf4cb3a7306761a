"""Libraries of the extra `corpus`, which training does not need: imported on first use."""

import importlib.metadata
from contextlib import suppress
from importlib import import_module
from typing import Any

from codeparrot_ds.errors import ConfigError


def import_extra(module: str, package: str, purpose: str) -> Any:
    """Import `module` of `package`. Raises ConfigError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {package}. Install it: pip install 'codeparrot-ds[corpus]'") from None


def versions() -> dict[str, str]:
    """Versions of the libraries that the result depends on, of those that are installed."""
    found = {}
    for name in ("codeparrot-ds", "google-re2", "kingfisher-secret-scanner", "licenseclassifier", "rensa"):
        with suppress(importlib.metadata.PackageNotFoundError):  # what needs it says how to install it
            found[name] = importlib.metadata.version(name)
    return found
