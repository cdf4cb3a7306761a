"""Which documents are for training and which for validation: a function of their content alone."""

from codeparrot_ds.documents.document import Document
from codeparrot_ds.errors import ConfigError

SPLITS = ("train", "valid")
VALID_FRACTION = 0.005  # of documents, unless the user says otherwise
_DIGEST_SPACE = 1 << 32


def require_fraction(valid_fraction: float, none: bool = False) -> None:
    """Raise ConfigError unless both splits can get documents; with `none`, validation may get none."""
    if not (0.0 < valid_fraction < 1.0 or (none and valid_fraction == 0.0)):
        least = "at least 0 and less than 1" if none else "between 0 and 1"
        raise ConfigError(f"--valid-fraction {valid_fraction}: must be {least}, e.g. {VALID_FRACTION}.")


def split_of(document: Document, valid_fraction: float) -> str:
    """ "valid" or "train", from a digest of the content only, so that copies are always in the same split."""
    return split_of_digest(int(document.digest(), 16), valid_fraction)


def split_of_digest(digest: int, valid_fraction: float) -> str:
    """Like `split_of`, for the digest of a document as an integer.

    Uses the digest's last 32 bits, because a corpus may have been sampled by the first.
    """
    return "valid" if digest % _DIGEST_SPACE < valid_fraction * _DIGEST_SPACE else "train"
