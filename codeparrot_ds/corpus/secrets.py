"""Secrets and personal data in a text: found, and replaced by placeholders.

Vendors' keys, private keys and passwords in URLs are found by the rules of Kingfisher, a scanner that runs in process.
E-mail addresses, IP addresses and string literals assigned to names such as `password` are found by RE2 patterns. The
time that both take is proportional to the text, whatever it contains.

What was found in 40,000 installed Python files that nobody planted anything in, and is no secret: e-mail addresses of
mailing lists and made-up ones in tests (most addresses are those of authors); message ids and algorithms that look like
addresses (sk-ssh-ed25519@openssh.com); addresses of networks, and sections of standards with four numbers; digests and
public keys assigned to names such as `publicKeyToken`; invented passwords in tests.
"""

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from codeparrot_ds.corpus.extra import import_extra
from codeparrot_ds.corpus.options import Secrets

# Of findings that overlap, the first kind counts.
PLACEHOLDERS = {
    "private key": "<PRIVATE_KEY>",
    "key": "<KEY>",
    "password": "<PASSWORD>",
    "email": "<EMAIL>",
    "ip address": "<IP_ADDRESS>",
}
_CONTINUATION = bytes(range(0x80, 0xC0))  # bytes of UTF-8 that do not start a character
_PRIORITY = {kind: number for number, kind in enumerate(PLACEHOLDERS)}
_ONLY_PLACEHOLDERS = re.compile(rf"(?:{'|'.join(PLACEHOLDERS.values())}|\W)*")

# Keys that Kingfisher finds only beside another part of the credential, or in other lengths, or not at all.
_KEYS = rb"\b(?:" + rb"|".join([
    rb"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}",  # AWS
    rb"AccountKey=[A-Za-z0-9+/]{86}==",  # Azure storage
    rb"[MNO][\w\-]{23,25}\.[\w\-]{6}\.[\w\-]{27,}",  # Discord
    rb"gh[pousr]_[A-Za-z0-9]{36,}",  # GitHub
    rb"GOCSPX-[\w\-]{28}",  # Google
    rb"ya29\.[\w\-]{30,}",  # Google
    rb"hf_[A-Za-z0-9]{34,}",  # Hugging Face
    rb"eyJ[\w\-]{10,}\.eyJ[\w\-]{10,}\.[\w\-]{10,}",  # JSON web token
    rb"[0-9a-f]{32}-us[0-9]{1,2}",  # Mailchimp
    rb"key-[0-9a-f]{32}",  # Mailgun
    rb"secret_[A-Za-z0-9]{43}",  # Notion
    rb"sk-[A-Za-z0-9]{48}",  # OpenAI
    rb"sk-(?:proj|svcacct|admin|ant)-[\w\-]{40,}",  # OpenAI, Anthropic
    rb"pypi-[\w\-]{85,}",  # PyPI
    rb"[sr]k_test_[0-9A-Za-z]{16,}",  # Stripe
    rb"whsec_[A-Za-z0-9+/]{32,}",  # Stripe
    rb"[0-9]{8,10}:AA[\w\-]{33}",  # Telegram
    rb"AC[0-9a-f]{32}",  # Twilio
]) + rb")"  # fmt: skip
# Without its end, as in a text that was cut off.
_PRIVATE_KEY = rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:[\s\\nr\"'+]*[A-Za-z0-9+/=]{40,})+"

_EMAIL = rb"[A-Za-z0-9][A-Za-z0-9._%+\-]*@[A-Za-z0-9][A-Za-z0-9.\-]*\.[A-Za-z]+"
_EMAIL_MAX = 254  # RFC 5321
# A matrix product such as `x@self.weight` has the form of an address, so its last part must be a known domain.
_TOP_DOMAINS = {
    "com", "org", "net", "edu", "gov", "mil", "int", "info", "biz", "name", "pro", "mobi", "aero", "asia", "coop",
    "jobs", "tel", "travel", "museum", "app", "dev", "tech", "cloud", "email", "online", "site", "xyz", "top",
    "club", "shop", "store", "blog", "page", "space", "world", "live", "life", "work", "team", "group", "agency",
    "digital", "network", "systems", "solutions", "software", "services", "academy", "institute", "university",
    "foundation", "company", "studio", "design", "codes", "engineering", "technology", "health", "science",
}  # fmt: skip
# RFC 2606
_RESERVED_DOMAINS = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net)|example|test|invalid|localhost|local)$")
_LOGIN_NAMES = {"git", "hg", "svn"}  # of repositories, as in git@host:owner/name
_CODE_AFTER = re.compile(rb"[(\[_0-9]")
_URL_BEFORE = re.compile(rb"//[^\s/@\"']*\Z")  # what follows is the user and the host of a URL
_CONTEXT = 64  # bytes before a finding that are looked at

_IPV4 = rb"[0-9]+\.[0-9]+\.[0-9]+\.[0-9]+"
_IPV6 = rb"[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]*[0-9A-Fa-f:]"
_OBJECT_IDENTIFIERS = ("1.3.101.", "2.5.")  # in certificates
_VERSION_NUMBER = 32  # four numbers below it are taken for a version, a section or an object identifier
_VERSION_BEFORE = re.compile(
    rb"(?i)(?:\bv|\bver|version|release|\brev|\bsections?|[=<>~!]=|[a-z]/)_*[\"'\])]*[ \t]*[:=,(]*[ \t]*[\"'(]*\Z"
)
_PART_BEFORE = re.compile(rb"[\w.\-]\Z")
_PART_AFTER = re.compile(rb"[\w\-]|\.\w")
_RESOLVERS = {
    "1.1.1.1", "1.0.0.1", "8.8.8.8", "8.8.4.4", "9.9.9.9", "208.67.222.222", "208.67.220.220", "2001:4860:4860::8888",
    "2001:4860:4860::8844", "2606:4700:4700::1111", "2606:4700:4700::1001", "2620:fe::fe",
}  # fmt: skip

_PASSWORD_NAME = rb"pass_?word|passwd|pass_?phrase|pswd|pwd|(?:\b|_)(?:pass|pw)\b"
_TOKEN_NAME = (
    rb"secret|token|credentials?|authorization|(?:access|account|aes|api|app|auth|client|consumer|encryption|hmac|master|"
    rb"private|secret|service|session|shared|signing|ssh|storage|subscription)[_\-]?key"
)
_ASSIGNMENT = (
    rb"(?i)(?:(" + _PASSWORD_NAME + rb")|" + _TOKEN_NAME + rb")(?:s|[0-9]+|_[a-z0-9_]*)?"
    rb"[\"']?\]?\s*(?::[ \t]*[a-z_][a-z0-9_\[\]., |]*=|:|=+|:=|=>|(,))\s*\(?\s*[rbuf]*"
    rb"(?:\"(?:bearer |basic |token )?([^\"\s]+)\"|'(?:bearer |basic |token )?([^'\s]+)')"
)
_VALUE_MAX = 512  # characters
_PLACEHOLDER = re.compile(
    r"(?i)example|placeholder|change_?me|your|dummy|sample|pass_?w(?:or)?d|passw0rd|secret|token|test|fake|mock|foobar|"
    r"redacted|xxxx|\*\*\*|\.\.\.|123456|<[\w .|/-]*>|\{\w*\}|%\(\w+\)s|^\$\{?\w+\}?$|^\[\w+\]$|^[a-z+]+://|\(\)|\(\?|\\[dnrstw]"
)
_PATH = re.compile(r"[~.]*/.*/|[A-Za-z]:\\")
_WORD_SEPARATORS = re.compile(r"[_\-./: ]+")
_WORD = re.compile(r"[A-Z]*[a-z]*(?:[A-Z][a-z]{2,})*")
_CONSONANTS = re.compile(r"[BCDFGHJKLMNPQRSTVWXZ]?[bcdfghjklmnpqrstvwxz]{5}|[BCDFGHJKLMNPQRSTVWXZ]{5}")
_CHANGES = 0.2  # smallest share of neighbouring characters of different classes in random text; about 0.45 is usual
_CHARACTER_CLASSES = str.maketrans(
    {chr(c): "a" if chr(c).islower() else "A" if chr(c).isupper() else "0" for c in range(128) if chr(c).isalnum()}
)
_CHANGE = re.compile(r"(?=a[A0]|A0|0[aA])")  # a capitalised word is no change


@dataclass(frozen=True, slots=True)
class Finding:
    """A secret or personal data in a text.

    Attributes:
        kind: a key of `PLACEHOLDERS`.
        start: first character.
        end: one past the last character.
    """

    kind: str
    start: int
    end: int


def find_secrets(text: str, rules: Secrets) -> list[Finding]:
    """Find secrets and personal data: disjoint, in the order of the text.

    Kinds, and what is left out:

    - email: the last part of the domain must be a known one; not the reserved domains of RFC 2606, and not
      git@host.
    - ip address: IPv4, and IPv6 of 2000::/3; not private, loopback, link-local, multicast and documentation addresses,
      not public name servers, and not what reads like a version: four numbers below 32, or after "version" or "==".
    - password: a string literal without white space assigned to a name such as `password`; a password in a URL.
    - key: a string literal assigned to a name such as `api_key` or `token`; a vendor's key wherever it is.
    - private key: a PEM or PGP block.

    A literal must be random enough (`Secrets`, `_is_secret`); words, paths, templates and placeholders such as
    "changeme" are left out.

    Raises:
        ConfigError: the extra `corpus` is not installed.
    """
    encoded = text.encode()
    found = [*_scan(encoded), *_keys(encoded), *_emails(encoded), *_addresses(encoded), *_assignments(encoded, rules)]
    merged = _merge(found)
    if len(encoded) != len(text):
        merged = _in_characters(merged, encoded)
    return [each for each in merged if not _ONLY_PLACEHOLDERS.fullmatch(text, each.start, each.end)]


def redact(text: str, rules: Secrets) -> tuple[str, Counter[str]]:
    """Replace secrets and personal data by placeholders.

    Returns:
        The text, in which nothing is found any more, and the number of replacements of each kind.
    """
    counts: Counter[str] = Counter()
    while found := find_secrets(text, rules):  # a replacement may be the boundary that another finding lacked
        parts, end = [], 0
        for each in found:
            parts += [text[end : each.start], PLACEHOLDERS[each.kind]]
            end = each.end
            counts[each.kind] += 1
        text = "".join([*parts, text[end:]])
    return text, counts


def _scan(encoded: bytes) -> Iterator[Finding]:
    """Find vendors' keys, private keys and passwords in URLs."""
    for each in _scanner().scan(encoded):
        url = each.rule_id.endswith("-uri")
        if not each.visible or (url and (_PLACEHOLDER.search(each.secret) or _is_plain(each.secret))):
            continue
        kind = "password" if url else "private key" if "private-key" in each.rule_id else "key"
        yield Finding(kind, each.location["start_offset"], each.location["end_offset"])


def _keys(encoded: bytes) -> Iterator[Finding]:
    for match in _pattern(_KEYS).finditer(encoded):
        if b"EXAMPLE" not in match.group():
            yield Finding("key", *match.span())
    for match in _pattern(_PRIVATE_KEY).finditer(encoded):
        yield Finding("private key", *match.span())


def _emails(encoded: bytes) -> Iterator[Finding]:
    for match in _pattern(_EMAIL).finditer(encoded):
        start, end = match.span()
        if end - start > _EMAIL_MAX or _CODE_AFTER.match(encoded, end) or _URL_BEFORE.search(_before(encoded, start)):
            continue
        local, _, domain = match.group().decode().partition("@")
        top = domain.rpartition(".")[2]
        known = (top.lower() in _TOP_DOMAINS or len(top) == 2) and (top.islower() or top.isupper())
        reserved = local in _LOGIN_NAMES or _RESERVED_DOMAINS.search(domain.lower())
        if known and not reserved and ".." not in domain:
            yield Finding("email", start, end)


def _addresses(encoded: bytes) -> Iterator[Finding]:
    for pattern in (_IPV4, _IPV6):
        for match in _pattern(pattern).finditer(encoded):
            start, end = match.span()
            before = _before(encoded, start)
            if _PART_BEFORE.search(before) or _PART_AFTER.match(encoded, end) or _VERSION_BEFORE.search(before):
                continue
            if _is_personal(match.group().decode()) and not (pattern is _IPV6 and before.endswith(b":")):
                yield Finding("ip address", start, end)


def _before(encoded: bytes, place: int) -> bytes:
    return encoded[max(0, place - _CONTEXT) : place]


def _is_personal(text: str) -> bool:
    """Whether an address may belong to somebody."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:  # "1.2.3.456", "2021:10:11"
        return False
    if not address.is_global or address.is_multicast or text.lower() in _RESOLVERS:
        return False
    if address.version == 6:
        return len(text.strip(":").replace("::", ":").split(":")) >= 3  # a[2000::2] is a slice
    return max(address.packed) >= _VERSION_NUMBER and not text.startswith(_OBJECT_IDENTIFIERS)


def _assignments(encoded: bytes, rules: Secrets) -> Iterator[Finding]:
    for match in _pattern(_ASSIGNMENT).finditer(encoded):
        name, comma, quoted, _ = match.groups()
        group = 4 if quoted is None else 3
        # After a comma the literal may be something else: the next of a list rather than a default value.
        if _is_secret(match.group(group).decode(), rules, password=bool(name and not comma)):
            yield Finding("password" if name else "key", *match.span(group))


def _is_secret(value: str, rules: Secrets, *, password: bool) -> bool:
    """Whether a string literal with such a name is a secret rather than a word, a path or a placeholder.

    A key or a token needs to look random; for a password it is enough not to be plain words.
    """
    shortest, entropy = (
        (rules.password_min, rules.password_entropy) if password else (rules.token_min, rules.token_entropy)
    )
    if not shortest <= len(value) <= _VALUE_MAX or _entropy(value) < entropy:
        return False
    if _PLACEHOLDER.search(value):
        return False
    return _looks_random(value) or (password and not _is_plain(value) and not _PATH.match(value))


def _entropy(value: str) -> float:
    """Shannon entropy, bits per character."""
    counts = Counter(value).values()
    return math.log2(len(value)) - sum(count * math.log2(count) for count in counts) / len(value)


def _is_plain(value: str) -> bool:
    """Whether it consists of words only, such as "admin_user" and "AdminUser", or of digits only."""
    return value.isdigit() or (
        _CONSONANTS.search(value) is None and all(map(_WORD.fullmatch, _WORD_SEPARATORS.split(value)))
    )


def _looks_random(value: str) -> bool:
    """Whether upper case, lower case and digits alternate as in random text, or consonants follow one another."""
    changes = len(_CHANGE.findall(value.translate(_CHARACTER_CLASSES)))
    return changes >= _CHANGES * len(value) or _CONSONANTS.search(value) is not None


def _merge(found: list[Finding]) -> list[Finding]:
    """Join findings that overlap."""
    merged: list[Finding] = []
    for each in sorted(found, key=lambda finding: (finding.start, finding.end)):
        last = merged[-1] if merged else None
        if last is None or each.start >= last.end:
            merged.append(each)
        else:
            kind = min(last.kind, each.kind, key=_PRIORITY.__getitem__)
            merged[-1] = Finding(kind, last.start, max(last.end, each.end))
    return merged


def _in_characters(found: list[Finding], encoded: bytes) -> list[Finding]:
    """Positions in bytes as positions in characters."""
    moved, place, characters = [], 0, 0
    for each in found:
        start = characters + len(encoded[place : each.start].translate(None, _CONTINUATION))
        characters = start + len(encoded[each.start : each.end].translate(None, _CONTINUATION))
        place = each.end
        moved.append(Finding(each.kind, start, characters))
    return moved


@cache
def _pattern(pattern: bytes) -> Any:
    return import_extra("re2", "google-re2", "The search for secrets").compile(pattern)


@cache
def _scanner() -> Any:
    """Kingfisher's scanner. Its rules take 3 s of CPU time to compile; it caches them in the user's cache directory."""
    kingfisher = import_extra("kingfisher_sdk", "kingfisher-secret-scanner", "The search for secrets")
    return kingfisher.Scanner(kingfisher.Rules(), base64=False)
