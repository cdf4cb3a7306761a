"""Secrets and personal data: what is found, what is not, and that redaction leaves nothing to find."""

import base64
import ipaddress
import json
import random
import re
import string
import sys
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codeparrot_ds.corpus import secrets
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
    "private key, cut off": (lambda r: re.split(r"(?:\\n|\s)+-----END", private_key(r))[0], "private key"),
    "AWS session": (lambda r: "ASIA" + some(r, UPPER, 16), "key"),
    "Azure": (lambda r: f"AccountKey={some(r, ALNUM + '+/', 86)}==", "key"),
    "Discord": (lambda r: f"M{some(r, ALNUM, 23)}.{some(r, ALNUM, 6)}.{some(r, URL_SAFE, 26)}x", "key"),
    "Google client": (lambda r: f"GOCSPX-{some(r, URL_SAFE, 27)}x", "key"),
    "Google session": (lambda r: f"ya29.{some(r, URL_SAFE, 67)}x", "key"),
    "Mailchimp": (lambda r: f"{some(r, HEX, 32)}-us{r.randrange(1, 30)}", "key"),
    "Mailgun": (lambda r: "key-" + some(r, HEX, 32), "key"),
    "Notion": (lambda r: "secret_" + some(r, ALNUM, 43), "key"),
    "Stripe hook": (lambda r: "whsec_" + some(r, ALNUM, 32), "key"),
    "Telegram": (lambda r: f"{some(r, '123456789', 9)}:AA{some(r, URL_SAFE, 33)}", "key"),
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


@cache
def real_sources(count: int) -> list[list[str]]:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_text(encoding="utf-8") for file in files if file.stat().st_size < 20_000]
    return [text.splitlines(keepends=True) for text in texts if not find_secrets(text, RULES)][:count]


@pytest.mark.parametrize("kind", PLANTED)
def test_planted_in_real_source(kind: str) -> None:
    """100 of each kind: at least 99 % are found whole, as their kind, and are gone after redaction."""
    rng = random.Random(kind)
    make, expected = PLANTED[kind]
    sources = real_sources(20)
    assert len(sources) == 20
    missed = []
    for number in range(100):
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
    assert len(missed) <= 1, missed


@pytest.mark.parametrize(
    ("text", "kind", "found"),
    [
        ("# Ann Lee <ann.lee+x@mail.uni-bonn.de>, 2020", "email", "ann.lee+x@mail.uni-bonn.de"),
        ("mailto:ANN@LEE.ORG.", "email", "ANN@LEE.ORG"),
        ("é = 'ann@lee.org'", "email", "ann@lee.org"),  # positions are in characters, not in bytes
        ("host = '81.2.69.142'", "ip address", "81.2.69.142"),
        ("server 81.2.69.142", "ip address", "81.2.69.142"),
        ("driver: '81.2.69.142'.", "ip address", "81.2.69.142"),
        ("version\n81.2.69.142\nb", "ip address", "81.2.69.142"),
        ("http://81.2.69.142:80/x", "ip address", "81.2.69.142"),
        ("[2001:41d0:302:2200::180]:80", "ip address", "2001:41d0:302:2200::180"),
        ("DB_PASSWORD = 'tr0ub4dor&3'", "password", "tr0ub4dor&3"),
        ("connect(user='x', passwd=\"hunter2\")", "password", "hunter2"),
        ("self.db_pass = 'Zx9,kq'", "password", "Zx9,kq"),
        ("if password == 'k3yb0ard': pass", "password", "k3yb0ard"),
        ("password: str = 'k3yb0ard'", "password", "k3yb0ard"),
        ("{'password': 'k3yb0ard'}", "password", "k3yb0ard"),
        ("os.environ['PASSWORD'] = b'k3yb0ard'", "password", "k3yb0ard"),
        ("password = (\n    'k3yb0ard'\n)", "password", "k3yb0ard"),
        ("redis://:k3yb0ard@cache:6379/0", "password", "k3yb0ard"),
        ("apiKey: 'f3b0c44298fc1c149afb'", "key", "f3b0c44298fc1c149afb"),
        ("getenv('API_TOKEN', 'f3b0c44298fc1c149afb')", "key", "f3b0c44298fc1c149afb"),
        ("{'X-Api-Key': 'f3b0c44298fc1c149afb'}", "key", "f3b0c44298fc1c149afb"),
        ("{'Authorization': 'Bearer f3b0c44298fc1c149afb'}", "key", "f3b0c44298fc1c149afb"),
    ],
)
def test_found(text: str, kind: str, found: str) -> None:
    start = text.index(found)
    assert find_secrets(text, RULES) == [Finding(kind, start, start + len(found))]
    assert redact(text, RULES) == (text.replace(found, PLACEHOLDERS[kind]), {kind: 1})


@pytest.mark.parametrize(
    "text",
    [
        "y = x@self.weight; q@k.mT; a@b.to(c)",
        "@decorator.name\ndef f(): ...",
        "git@github.com:owner/name.git",
        "someone@example.com someone@mail.example.org user@localhost a@b.test",
        "icon@2x.png",
        "127.0.0.1 10.1.2.3 192.168.0.1 172.16.5.4 169.254.1.1 224.0.0.1 255.255.255.255 0.0.0.0",
        "192.0.2.44 198.51.100.7 203.0.113.9 8.8.8.8",
        "__version__ = '81.2.3.4'; {'version': '81.2.3.4'}; version 91.0.4.12; Version('81.2.3.4'); 1.2.3.4",
        " numpy==81.2.3.4; v81.2.3.4; Chrome/81.0.40.1",
        "1.3.6.1.4.1.311.2 and 2.5.29.37 and 1.3.101.112 and 300.2.3.4 and 81.2.3.4-beta and 81.2.3.4rc1",
        "::1 fe80::1 2001:db8::1 fc00::1 ff02::1 x[2000::2] 2021:10:11 20:30:2e:ff:00:11 2001:4860:4860::8888",
        "password = 'password'; password = ''; passwd = 'secret'; pwd='changeme1!'; password='your-password-1'",
        "password = '<PASSWORD>'; password = '${DB_PASS}'; password = '{password1}'; password = '%(pw1)s'",
        "password = getpass(); password = os.environ['DB_PASSWORD_1']; password_file = '/run/x/db1'",
        "password_label = 'Enter it'; password = 'AdminUser'; password = 'admin_user'; password = '12345678'",
        "token = 'access_token'; pad_token = '[PAD]'; eos_token = '<|endoftext|>'; token_url = 'https://a.b/c1d2e3f4g5h6'",
        "tokenizer = 'bert-base-uncased-v1'; api_key = 'X-Api-Key'; secret_name = 'my-service/database/v2'",
        "key = 'model.layers.0.self_attn.q_proj.weight'; api_key = 'AKIAIOSFODNN7EXAMPLE'",
        "postgres://user:password@host.com/db and https://user:${PASS}@host.com and ssh://ann@host.com",
    ],
)
def test_not_found(text: str) -> None:
    assert find_secrets(text, RULES) == []
    assert redact(text, RULES) == (text, {})


@pytest.mark.parametrize(
    ("field", "text", "value"),
    [
        ("password_min", "pwd = 'a1b2c3'", 6),
        ("token_min", "token = 'f3b0c44298fc1c14'", 16),
        # 8 different characters: log2(8) = 3 bits; 16 different: 4 bits.
        ("password_entropy", "pwd = 'a1b2c3d4'", 3.0),
        ("token_entropy", "token = '0a1b2c3d4e5f6789'", 4.0),
    ],
)
def test_both_sides_of_each_threshold(field: str, text: str, value: float) -> None:
    assert len(find_secrets(text, Secrets.model_validate({field: value}))) == 1
    assert find_secrets(text, Secrets.model_validate({field: value + 1})) == []


FRAGMENTS = [
    *(
        "ann@lee.org",
        "x@a.com.",
        "@",
        ".com",
        "81.2.69.142",
        ".5",
        "2001:41d0:302::180",
        ":",
        "::1",
        "password",
        "token",
    ),
    *(
        ' = "',
        "='",
        '"',
        "'",
        "\n",
        " ",
        "tr0ub4dor&3",
        "f3b0c44298fc1c149afb",
        "ghp_",
        "aB3dE6gH9jK2" * 3,
        "https://u:",
    ),
    *("-----BEGIN PRIVATE KEY-----\n", "-----END PRIVATE KEY-----", "MIIEvQIBADANBgkqhkiG9w0", "AKIA2E0A8F3B244C9986"),
    *("<EMAIL>", "<KEY>", "é", "🦜", "_", "-", "\\n", "eyJhbGciOiJIUzI1NiJ9."),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=24))
def test_any_text_is_clean_after_redaction(fragments: list[str]) -> None:
    text = "".join(fragments)
    found = find_secrets(text, RULES)
    ends = [0, *(each.end for each in found)]
    assert all(end <= each.start < each.end <= len(text) for end, each in zip(ends, found, strict=False))
    redacted, counts = redact(text, RULES)
    assert sum(counts.values()) >= len(found)
    assert find_secrets(redacted, RULES) == []
    assert redact(redacted, RULES) == (redacted, {})


def test_findings_that_overlap_are_one() -> None:
    """A vendor's key assigned to a password's name, and a key that ends in an address."""
    key = "ghp_" + "aB3dE6gH9jK2" * 3
    assert redact(f"password = '{key}'", RULES) == ("password = '<KEY>'", {"key": 1})
    assert redact(f"token = 'x{key}@lee.org'", RULES) == ("token = '<KEY>'", {"key": 1})


def test_what_a_replacement_uncovers_is_replaced_too() -> None:
    text = "81.2.69.142ghp_" + "aB3dE6gH9jK2" * 3
    assert [each.kind for each in find_secrets(text, RULES)] == ["key"]
    assert redact(text, RULES) == ("<IP_ADDRESS><KEY>", {"key": 1, "ip address": 1})


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, function in (("re2", secrets._pattern), ("kingfisher_sdk", secrets._scanner)):
        monkeypatch.setitem(sys.modules, module, None)
        function.cache_clear()
        with pytest.raises(ConfigError, match=r"pip install 'codeparrot-ds\[corpus\]'"):
            find_secrets("x", RULES)
        monkeypatch.undo()
        function.cache_clear()
