"""Versions of libraries that change results."""

import importlib.metadata

from codeparrot_ds.errors import ConfigError

_OLDEST_TRANSFORMERS = (5, 4)


def require_transformers() -> None:
    """Raise ConfigError for transformers before 5.4, which ignores `scale_attn_by_inverse_layer_idx` with SDPA."""
    found = importlib.metadata.version("transformers")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST_TRANSFORMERS:
        needed = ".".join(map(str, _OLDEST_TRANSFORMERS))
        raise ConfigError(
            f"transformers {found} is installed, but {needed} is needed: older versions ignore "
            f"scale_attn_by_inverse_layer_idx. Install it: pip install 'transformers>={needed}'"
        )
