"""Text from outside as it may be shown."""


def printable(text: str) -> str:
    """Escape control characters in `text`, so that they cannot control a terminal, nor reorder the text around it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
