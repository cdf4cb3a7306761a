"""The result of preprocessing does not depend on the locale, the time zone or the umask."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from codeparrot_ds.system.files import read_user_text
from codeparrot_ds.system.paths import bytes_of, path_of, printable_name, text_of
from tests.conftest import ROOT, once

PROBE = ROOT / "tests" / "unit" / "probe_environment.py"
# Without these, Python takes the locales C and POSIX for UTF-8.
LOCALE_ALONE = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
ENVIRONMENTS: dict[str, tuple[str, dict[str, str]]] = {
    "UTF-8": ("022", {"LC_ALL": "C.UTF-8", "TZ": "UTC"}),
    "ASCII": ("077", {"LC_ALL": "C", "TZ": "Asia/Kolkata", **LOCALE_ALONE}),
    "Latin-1": ("002", {"LC_ALL": "en_US.ISO-8859-1", "TZ": "America/St_Johns"}),
    "C": ("000", {"LC_ALL": "C", "TZ": "Pacific/Apia"}),
    "POSIX": ("027", {"LC_ALL": "POSIX", "LANG": "de_DE", "TZ": ":/nonexistent", **LOCALE_ALONE}),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Source files and data files, some with names that are not ASCII and one that is not UTF-8."""

    def make(root: Path) -> None:
        for number, name in enumerate(["plain", "é", "日本", "😀", "z", "Å"]):
            for copy in range(4):
                text = "".join(
                    f"# {name}\ndef f{number}_{copy}_{i}(größe):\n    return größe + {i}\n" for i in range(12)
                )
                path = path_of(f"{root}/{name}{copy}.py")
                path.write_text(text, encoding="utf-8")
                os.utime(path, ns=(10**18, 10**18))
        rows = [
            json.dumps({"content": f"größe = {i}\n" * 20, "path": f"日本/{i}.py"}, ensure_ascii=False) for i in range(9)
        ]
        (root / "ü.jsonl").write_text("\n".join(rows), encoding="utf-8")
        os.utime(root / "ü.jsonl", ns=(10**18, 10**18))
        with open(os.fsencode(root) + b"/\xff.py", "w", encoding="utf-8") as file:
            file.write("not_utf8 = True\n")
        (root / "bad").mkdir()
        with open(os.fsencode(root) + b"/bad/\xe9.jsonl", "w", encoding="utf-8") as file:
            file.write('{"content": "x"}\n')
        (root / "ä" / "here").mkdir(parents=True)
        body = yaml.safe_load((ROOT / "launch" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
        body["data"]["shards"] = f"{root}/ä"
        (root / "recipe.yaml").write_text(yaml.safe_dump(body, allow_unicode=True), encoding="utf-8")

    return once(tmp_path_factory, "environment", make)


def results(source: Path, out: Path, name: str) -> dict[str, Any]:
    """Run the probe in one of the environments."""
    umask, variables = ENVIRONMENTS[name]
    if name == "Latin-1":
        if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/en_US").exists():
            pytest.skip("no localedef, or no source of the locale")
        (out.parent / "locales").mkdir()
        target = out.parent / "locales" / variables["LC_ALL"]
        subprocess.run(["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(target)], check=True, capture_output=True)
        variables = {**variables, "LOCPATH": str(target.parent)}
    done = subprocess.run(
        [sys.executable, str(PROBE), str(source), str(out), umask],
        env={
            **{k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))},
            "PYTHONPATH": str(ROOT),
            **variables,
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return dict(json.loads(done.stdout))


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result with UTF-8."""
    return results(source, tmp_path_factory.mktemp("utf8") / "out", "UTF-8")


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("ASCII", "ascii"),
        ("Latin-1", "iso8859-1"),
        pytest.param("C", "utf-8", marks=pytest.mark.nightly),
        pytest.param("POSIX", "ascii", marks=pytest.mark.nightly),
    ],
)
def test_every_environment_gives_the_same_files(
    name: str, encoding: str, source: Path, expected: dict[str, Any], tmp_path: Path
) -> None:
    found = results(source, tmp_path / "out", name)
    assert found["encoding"] == encoding
    assert expected["encoding"] == "utf-8"
    mode = found["found"].pop("mode")
    assert (mode == oct(0o40777 & ~int(ENVIRONMENTS[name][0], 8))) and mode != expected["found"]["mode"]
    assert found["found"] == {key: each for key, each in expected["found"].items() if key != "mode"}
    assert found["found"]["directory that a recipe names"] == "here"
    assert "its name is not UTF-8. Rename it." in found["found"]["error"]
    assert len(found["found"]) > 15


def test_names_are_bytes() -> None:
    for name in (b"plain", "é日本😀".encode(), b"caf\xe9", b"\xff\xfe"):
        assert bytes_of(text_of(os.fsdecode(name))) == name
        assert os.fsencode(path_of(text_of(os.fsdecode(name)))) == name
    assert printable_name(text_of(os.fsdecode(b"caf\xe9"))) == "caf\\udce9"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xef\xbb\xbfa\n\xff")
    assert read_user_text(tmp_path / "f") == "a\n\udcff"


def test_any_name_can_be_printed(tmp_path: Path) -> None:
    """Also one that is not UTF-8, or that the encoding of the terminal lacks."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.py").write_text("x = 1\n", encoding="utf-8")
    for number, (name, variables) in enumerate(
        (
            (b"caf\xe9", {"LC_ALL": "C.UTF-8"}),
            ("日本".encode(), {"LC_ALL": "C", **LOCALE_ALONE}),
            ("日本".encode(), {"LC_ALL": "C.UTF-8", "PYTHONIOENCODING": "ascii"}),
        )
    ):
        output = os.fsencode(tmp_path) + b"/%d-" % number + name
        done = subprocess.run(
            [sys.executable, "-m", "codeparrot_ds.cli", "corpus", "collect", str(tmp_path / "in"), "-o", output],
            env={**os.environ, **variables},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"documents" in done.stdout
        assert os.path.exists(output + b"/manifest.json")  # noqa: PTH110 (bytes)
