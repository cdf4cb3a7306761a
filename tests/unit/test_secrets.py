"""Secrets and personal data: what is found, what is not, and that redaction leaves nothing to find."""

import base64
import ipaddress
import json
import random
import string
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.corpus.options import Secrets
from codeparrot_ds.corpus.secrets import PLACEHOLDERS, Finding, find_secrets, redact
from codeparrot_ds.errors import ConfigError

RULES = Secrets()
ALNUM = string.ascii_letters + string.digits
UPPER = string.ascii_uppercase + string.digits
LOWER = string.ascii_lowercase + string.digits
URL_SAFE = ALNUM + "-_"
HEX = "0123456789abcdef"


def some(rng: random.Random, alphabet: str, length: int) -> str:
    return "".join(rng.choices(alphabet, k=length))


def encoded(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def global_ipv4(rng: random.Random) -> str:
    while not (address := ipaddress.IPv4Address(rng.getrandbits(32))).is_global or address.is_multicast:
        pass
    return str(address)


def json_web_token(rng: random.Random) -> str:
    header, claims = {"alg": "HS256", "typ": "JWT"}, {"sub": some(rng, string.digits, 10), "iat": rng.randrange(2**31)}
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), rng.randbytes(32)]
    return ".".join(map(encoded, parts))


def private_key(rng: random.Random) -> str:
    kind = rng.choice(["", "RSA ", "EC ", "DSA ", "OPENSSH ", "ENCRYPTED "])
    lines = [some(rng, ALNUM + "+/", 64) for _ in range(rng.randrange(4, 26))]
    end = rng.choice(["\n", "\n    ", "\\n", "\r\n"])  # also indented, and in one line
    return end.join([f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"])


# Of each kind: how a value is made, and the kind it is found as.
PLANTED: dict[str, tuple[Callable[[random.Random], str], str]] = {
    "email": (lambda r: f"{some(r, LOWER, 6)}.{some(r, LOWER, 5)}@{some(r, string.ascii_lowercase, 8)}.com", "email"),
    "IPv4": (global_ipv4, "ip address"),
    "IPv6": (lambda r: str(ipaddress.IPv6Address((0x2600 << 112) + r.getrandbits(112))), "ip address"),
    "password": (lambda r: some(r, ALNUM + "!@#$%^&*", r.randrange(10, 20)), "password"),
    "hexadecimal token": (lambda r: some(r, HEX, 32), "key"),
    "token": (lambda r: some(r, URL_SAFE, 32), "key"),
    "private key": (private_key, "private key"),
    "AWS key id": (lambda r: "AKIA" + some(r, UPPER, 16), "key"),
    "AWS secret key": (lambda r: some(r, ALNUM + "+/", 40), "key"),
    "GitHub": (lambda r: r.choice(["ghp_", "gho_", "ghu_", "ghs_", "ghr_"]) + some(r, ALNUM, 36), "key"),
    "GitHub fine-grained": (lambda r: f"github_pat_{some(r, ALNUM, 22)}_{some(r, ALNUM, 59)}", "key"),
    "GitLab": (lambda r: "glpat-" + some(r, URL_SAFE, 20), "key"),
    "Slack": (lambda r: f"xoxb-{some(r, string.digits, 12)}-{some(r, string.digits, 12)}-{some(r, ALNUM, 24)}", "key"),
    "Slack hook": (
        lambda r: f"https://hooks.slack.com/services/T{some(r, UPPER, 8)}/B{some(r, UPPER, 10)}/{some(r, ALNUM, 24)}",
        "key",
    ),
    "Google": (lambda r: "AIza" + some(r, URL_SAFE, 35), "key"),
    "Stripe": (lambda r: r.choice(["sk_live_", "rk_live_", "sk_test_"]) + some(r, ALNUM, 24), "key"),
    "OpenAI": (lambda r: f"sk-{some(r, ALNUM, 20)}T3BlbkFJ{some(r, ALNUM, 20)}", "key"),
    "OpenAI project": (lambda r: f"sk-proj-{some(r, URL_SAFE, 74)}T3BlbkFJ{some(r, URL_SAFE, 73)}A", "key"),
    "Anthropic": (lambda r: f"sk-ant-api03-{some(r, URL_SAFE, 93)}AA", "key"),
    "Hugging Face": (lambda r: "hf_" + some(r, string.ascii_letters, 34), "key"),
    "npm": (lambda r: "npm_" + some(r, ALNUM, 36), "key"),
    "PyPI": (lambda r: "pypi-AgEIcHlwaS5vcmc" + some(r, URL_SAFE, 150), "key"),
    "Twilio": (lambda r: "SK" + some(r, HEX, 32), "key"),
    "SendGrid": (lambda r: f"SG.{some(r, URL_SAFE, 22)}.{some(r, URL_SAFE, 43)}", "key"),
    "JSON web token": (json_web_token, "key"),
    "password in a URL": (lambda r: some(r, ALNUM, 12), "password"),
}
NAMES = {
    "password": ["password", "PASSWORD", "db_passwd", "smtp_pwd"],
    "hexadecimal token": ["api_key", "API_KEY", "auth_token", "client_secret"],
    "token": ["token", "SECRET_KEY", "access_token", "credentials"],
    "AWS secret key": ["aws_secret_access_key", "AWS_SECRET_ACCESS_KEY"],
}


def assign(name: str, value: str, rng: random.Random) -> str:
    quote = rng.choice("\"'")
    return rng.choice(
        [f"{name} = {quote}{value}{quote}", f"f({name}={quote}{value}{quote})", f'{{"{name}": {quote}{value}{quote}}}']
    )


def written(kind: str, value: str, rng: random.Random) -> str:
    if kind == "password in a URL":
        return f'engine = connect("postgres://admin:{value}@{some(rng, LOWER, 6)}:5432/things")'
    if kind == "private key":
        return f'KEY = """{value}"""'
    return assign(rng.choice(NAMES.get(kind, ["value"])), value, rng)


def real_sources(count: int) -> list[list[str]]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files if file.stat().st_size < 20_000]
    return [text.splitlines(keepends=True) for text in texts if not find_secrets(text, RULES)][:count]


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_in_real_source(kind: str) -> None:
    """200 of each kind: at least 99 % are found whole, as their kind, and are gone after redaction."""
    rng = random.Random(kind)
    make, expected = PLANTED[kind]
    sources = real_sources(20)
    assert len(sources) == 20
    missed = []
    for number in range(200):
        lines, value = list(sources[number % 20]), make(rng)
        lines.insert(rng.randrange(len(lines) + 1), written(kind, value, rng) + "\n")
        text = "".join(lines)
        start = text.index(value)
        found = find_secrets(text, RULES)
        if not any(each.kind == expected and each.start <= start < start + len(value) <= each.end for each in found):
            missed.append(value)
        else:
            redacted, counts = redact(text, RULES)
            assert counts == {expected: 1} and PLACEHOLDERS[expected] in redacted and value not in redacted
            assert redact(redacted, RULES) == (redacted, {})
    assert len(missed) <= 2, missed
