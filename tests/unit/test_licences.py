"""Licences: texts, wordings and repositories, and which of them are permissive."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

from codeparrot_ds.corpus import licences
from codeparrot_ds.corpus.licences import PERMISSIVE, find_licence, identify, is_allowed, is_permissive
from codeparrot_ds.corpus.options import Licences
from codeparrot_ds.errors import ConfigError

MIT = """MIT License

Copyright (c) 2020 Somebody

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
# Statements by which a file names its licence; whole texts are taken from this machine.
GPL_3 = """This program is free software: you can redistribute it and/or modify it under the terms of the GNU General
Public License as published by the Free Software Foundation, either version 3 of the License, or (at your option) any
later version. This program is distributed in the hope that it will be useful, but WITHOUT ANY WARRANTY; without even
the implied warranty of MERCHANTABILITY or FITNESS FOR A PARTICULAR PURPOSE. See the GNU General Public License for more
details. You should have received a copy of the GNU General Public License along with this program. If not, see
<https://www.gnu.org/licenses/>.
"""
TAG = "# SPDX-License-Identifier: Apache-2.0 OR MIT\nimport os\n"
COMMON = Path("/usr/share/common-licenses")  # of Debian
COPYLEFT = {
    "GPL-1": "GPL-1.0",
    "GPL-2": "GPL-2.0",
    "GPL-3": "GPL-3.0",
    "LGPL-2": "LGPL-2.0",
    "LGPL-2.1": "LGPL-2.1",
    "LGPL-3": "LGPL-3.0",
    "MPL-1.1": "MPL-1.1",
    "MPL-2.0": "MPL-2.0",
}


def labelled() -> dict[str, str]:
    """Licence texts of installed packages and of Debian, and what their metadata or names say they are."""
    texts = {}
    for name, licence in {**COPYLEFT, "Apache-2.0": "Apache-2.0", "BSD": "BSD-3-Clause", "CC0-1.0": "CC0-1.0"}.items():
        if (COMMON / name).exists():
            texts[(COMMON / name).read_text(encoding="utf-8", errors="replace")] = licence
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata
        label = (metadata.get("License-Expression") or metadata.get("License") or "").strip()
        files = [file for file in distribution.files or () if "dist-info" in str(file)]
        files = [file for file in files if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING"))]
        if label in LABELS and len(files) == 1:
            path = Path(str(distribution.locate_file(files[0])))
            if 500 < path.stat().st_size < 40_000:
                texts[path.read_text(encoding="utf-8", errors="replace")] = label
    return texts


LABELS = {
    *("MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "MPL-2.0", "PSF-2.0", "MIT-0", "ISC"),
    *("GPL-2.0", "GPL-3.0", "LGPL-2.1", "LGPL-3.0"),
}


def test_texts_of_this_machine_are_identified() -> None:
    """At least 95 % of the texts whose metadata name one licence are that licence (bundled ones may come beside it)."""
    texts = labelled()
    assert len(texts) > 30
    found = [(label, identify(text)) for text, label in texts.items()]
    wrong = [(label, licence) for label, licence in found if label not in licence.split(" AND ")]
    assert len(wrong) <= 0.05 * len(texts), wrong


@pytest.mark.skipif(not COMMON.exists(), reason="no copyleft texts on this machine")
@pytest.mark.parametrize("name", COPYLEFT)
def test_copyleft_texts_are_not_permissive(name: str) -> None:
    text = (COMMON / name).read_text(encoding="utf-8", errors="replace")
    assert identify(text) == COPYLEFT[name]
    # Nor beside a permissive one, in either order, or with the name of one.
    for whole in (
        text,
        f"{MIT}\n{text}",
        f"{text}\n{MIT}",
        f"SPDX-License-Identifier: MIT\n{text}",
        f"MIT License\n{text}",
    ):
        assert not is_permissive(identify(whole)), identify(whole)
        assert not is_allowed(whole, Licences(allowed="permissive"))


def test_texts_and_notices() -> None:
    assert identify(MIT) == "MIT"
    assert identify(MIT + "Copyright (c) 2021 Somebody else\n" * 60) == "MIT"
    assert identify(GPL_3) == "GPL-3.0-or-later"
    assert identify(f"{MIT}\n{GPL_3}") == "MIT AND GPL-3.0-or-later"
    clause = "Commons Clause: the grant of rights under the License will not include the right to Sell the Software.\n"
    for text in (clause + MIT, MIT + clause, MIT + "You must obey these additional restrictions: do not sell it.\n"):
        assert identify(text) == "MIT AND LicenseRef-further-terms"
        assert not is_permissive(identify(text))
    assert identify(TAG) == "Apache-2.0 OR MIT"
    assert identify("Apache 2.0") == "Apache-2.0"
    other = "This is a list of certificates that somebody collected, and which is of use to everybody. " * 40
    assert identify(other + MIT) == "" and identify(other + GPL_3) == "GPL-3.0-or-later"
    assert identify("Do what you want with it, but tell me.") == ""
    assert identify("") == ""


def test_a_text_is_identified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(licences, "_identified", {})
    monkeypatch.setattr(licences, "_CACHED", 2)
    assert [identify(text) for text in (MIT, GPL_3, MIT)] == ["MIT", "GPL-3.0-or-later", "MIT"]
    calls = []
    monkeypatch.setattr(licences, "_identify", lambda text: calls.append(text) or "new")
    assert identify(MIT) == "MIT" and calls == []
    assert identify("another") == "new" and len(licences._identified) == 1  # the cache is bounded


@pytest.mark.parametrize(
    "wording",
    [
        # The names of the permissive licences in the original's data set.
        *("mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0"),
        *sorted(PERMISSIVE),
        *("MIT License", "The MIT License (MIT)", "MIT/X11", "Expat", "MIT licensed"),
        *("Apache License, Version 2.0", "Apache 2", "Apache License v2.0", "ASL 2.0", "Apache-2.0+"),
        *("License :: OSI Approved :: BSD License", "License :: OSI Approved :: Apache Software License"),
        *("BSD", "New BSD", "3-Clause BSD License", "BSD (3-clause)", 'BSD 3-Clause "New" or "Revised" License'),
        *("ISC License (ISCL)", "The Unlicense (Unlicense)", "zlib/libpng License", "PSFL"),
        *("Boost Software License 1.0 (BSL-1.0)", "Python Software Foundation License"),
        *("MIT OR GPL-2.0", "GPL-3.0-only or mit", "MIT/Apache-2.0", "(MIT OR GPL-3.0) AND BSD-3-Clause"),
        *("Apache-2.0 WITH LLVM-exception", "BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", "MIT, Apache-2.0"),
        "GPL-2.0 AND MPL-2.0 OR MIT",
    ],
)
def test_permissive(wording: str) -> None:
    assert is_permissive(wording)
    assert is_allowed(wording, Licences(allowed="permissive"))


@pytest.mark.parametrize(
    "wording",
    [
        # The other licences of the original's data set.
        *("gpl-2.0", "gpl-3.0", "agpl-3.0", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "epl-1.0", "artistic-2.0"),
        *("GPL", "GNU GPL v2 or later", "GPL-2.0-only WITH Classpath-exception-2.0", "GPL-3.0 WITH LLVM-exception"),
        *("License :: OSI Approved :: GNU General Public License v3 (GPLv3)", "License :: OSI Approved", "Other"),
        *("MIT AND GPL-2.0", "MIT, GPL-2.0", "(MIT OR GPL-3.0) AND GPL-2.0", "MIT/GPL-2.0 AND GPL-2.0", "MIT; GPL"),
        *("MIT with Commons Clause", "MIT (with Commons Clause)", "MIT + Commons Clause", "not MIT", "MIT-like"),
        *(
            "BUSL-1.1",
            "BSL 1.1",
            "SSPL-1.0",
            "CC-BY-SA-4.0",
            "CC-BY-NC-4.0",
            "BSD-4-Clause",
            "proprietary",
            "Dual License",
        ),
        "License :: OSI Approved :: GNU GPL, License :: OSI Approved :: MIT License",
        *("GPL-3.0 :: MIT", "GPL-3.0 AND License :: OSI Approved :: MIT License"),
        *("", " ", "MIT AND", "AND", "OR", "()", "MIT (GPL)", "GPL (MIT)", "(" * 400, "\0", "GPL \0", "MIT" * 400),
    ],
)
def test_not_permissive(wording: str) -> None:
    assert not is_permissive(wording)
    assert not is_allowed(wording, Licences(allowed="permissive"))


def test_rules_of_a_document() -> None:
    everything, listed = Licences(), Licences(allowed=("MIT", "gpl-3.0"))
    assert is_allowed("GPL-3.0", everything) and is_allowed("", everything)
    assert is_allowed("mit", listed) and is_allowed("The MIT License", listed) and is_allowed("GPL-3.0", listed)
    assert is_allowed("Apache-2.0 OR MIT", listed) and not is_allowed("Apache-2.0 AND MIT", listed)
    assert not is_allowed("Apache-2.0", listed) and not is_allowed("GPL-2.0", listed)
    assert is_allowed(MIT, Licences(allowed="permissive")) and is_allowed(MIT, listed)
    for unknown in (False, True):
        assert is_allowed("", Licences(allowed="permissive", unknown=unknown)) is unknown


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({"LICENSE": MIT}, "MIT"),
        ({"licence.md": MIT}, "MIT"),
        ({"COPYING": GPL_3}, "GPL-3.0-or-later"),
        ({"LICENSE": MIT, "COPYING": GPL_3}, "GPL-3.0-or-later AND MIT"),
        ({"LICENSE-MIT": MIT, "LICENSE-APACHE": "Apache 2.0"}, "Apache-2.0 OR MIT"),
        ({"LICENSE-MIT": MIT, "LICENSE-GPL": GPL_3}, "GPL-3.0-or-later AND MIT"),
        ({"LICENSE": TAG, "COPYING": GPL_3}, "GPL-3.0-or-later AND (Apache-2.0 OR MIT)"),
        ({"LICENSE": "See LICENSE-MIT.", "LICENSE-MIT": MIT}, "MIT"),
        ({"LICENSE": "All of it is ours. " * 40, "LICENSE.bundled": MIT}, "MIT AND LicenseRef-further-terms"),
        ({"LICENSE": MIT, "pyproject.toml": '[project]\nlicense = "GPL-3.0"'}, "MIT"),
        ({"license.py": MIT, "README": MIT, "licensecheck": MIT}, ""),
        ({"LICENSE": MIT, "license_headers.py": "x = 1\n" * 200, "license-checker-config.json": "[]" * 400}, "MIT"),
        ({"MIT-LICENSE.txt": MIT}, "MIT"),
        ({"UNLICENSE": "The Unlicense (Unlicense)"}, "Unlicense"),
        ({"LICENSES/Apache-2.0.txt": "", "LICENSES/CC0-1.0.txt": ""}, "Apache-2.0 AND CC0-1.0"),
        ({"pyproject.toml": '[project]\nlicense = "MIT OR GPL-2.0"'}, "MIT OR GPL-2.0"),
        ({"pyproject.toml": '[project]\nlicense = {text = "The MIT License"}'}, "MIT"),
        ({"pyproject.toml": f"[project]\nlicense = {{text = '''{MIT}'''}}"}, "MIT"),
        (
            {"pyproject.toml": '[project]\nclassifiers = ["X :: Y", "License :: OSI Approved :: ISC License (ISCL)"]'},
            "ISC",
        ),
        ({"pyproject.toml": '[tool.poetry]\nlicense = "Apache-2.0"'}, "Apache-2.0"),
        ({"setup.cfg": "[metadata]\nlicense = BSD 3-Clause"}, "BSD-3-Clause"),
        (
            {
                "setup.cfg": "[metadata]\nclassifiers =\n  A :: B\n  License :: OSI Approved :: MIT License\n"
                "  License :: OSI Approved\n  License :: OSI Approved :: GNU General Public License v3 (GPLv3)"
            },
            "MIT AND GNU General Public License v3 (GPLv3)",
        ),
        ({"package.json": json.dumps({"license": "ISC"})}, "ISC"),
        ({"package.json": json.dumps({"license": {"type": "MIT"}})}, "MIT"),
        ({"Cargo.toml": '[package]\nlicense = "MIT OR Apache-2.0"'}, "MIT OR Apache-2.0"),
        # Broken metadata say nothing.
        ({"pyproject.toml": "[project", "setup.cfg": "=", "package.json": "[" * 100_000}, ""),
        ({"pyproject.toml": 'project = "x"\ntool = 3', "package.json": "[]", "Cargo.toml": "package = 1"}, ""),
        ({"pyproject.toml": "[project]\nlicense = 3\nclassifiers = [1, {}]", "package.json": '{"license": [1]}'}, ""),
        ({}, ""),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_a_repository(tmp_path: Path, files: dict[str, str], licence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert find_licence(tmp_path) == licence


def test_only_small_regular_files_of_the_repository_are_read(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text(MIT)
    root = tmp_path / "root"
    root.mkdir()
    (root / "LICENSE").symlink_to(outside)
    (root / "COPYING").mkdir()
    (root / "LICENSE.txt").write_text(MIT + " " * 1_000_000)
    assert find_licence(root) == ""
    assert find_licence(tmp_path / "missing") == ""
    (root / "LICENSE.md").write_bytes(MIT.encode() + b"\xff\xfe")
    assert find_licence(root) == "MIT"


def test_without_the_extra_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "licenseclassifier", None)
    with pytest.raises(ConfigError, match=r"pip install 'codeparrot-ds\[corpus\]'"):
        identify("a text that was not seen before")
    assert is_permissive("MIT")  # names need no library
