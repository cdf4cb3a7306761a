"""Libraries of the extra `corpus`, which training does not need: imported on first use."""

from importlib import import_module
from typing import Any

from codeparrot_ds.errors import ConfigError


def import_extra(module: str, package: str, purpose: str) -> Any:
    """Import `module` of `package`. Raises ConfigError with the command that installs it."""
    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(f"{purpose} needs {package}. Install it: pip install 'codeparrot-ds[corpus]'") from None
