"""Source files are decoded as Python decodes them."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from codeparrot_ds.corpus.collect import collect
from codeparrot_ds.documents.document import BadDocument, Document
from codeparrot_ds.documents.inputs import Corpus, find_inputs
from codeparrot_ds.documents.read import read_documents
from codeparrot_ds.documents.source import (
    CONTRADICTORY_ENCODING,
    NOT_UTF8,
    UNKNOWN_ENCODING,
    WRONG_ENCODING,
    EncodingError,
    decode_source,
)

BOM = b"\xef\xbb\xbf"
RIGHT = {
    "no declaration": "s = 'naïve'\n".encode(),
    "latin-1": b"# -*- coding: latin-1 -*-\ns = 'na\xefve'\n",
    "in the second line": b"#!/usr/bin/python\n# vim: set fileencoding=cp1252 :\ns = '\x80'\n",
    "in the second line, after UTF-8": "# é\n".encode() + "# coding: koi8-r\ns = 'д'\n".encode("koi8-r"),
    "not in the third line": "x = 1\n\n# coding: latin-1\ns = 'é'\n".encode(),
    "not after code": "x = 1\n# coding: latin-1\ns = 'é'\n".encode(),
    "multi-byte": "# coding: shift_jis\ns = '漢字\\\\'\n".encode("shift_jis"),
    "stateful": "# coding: iso-2022-jp\ns = '漢字'\n".encode("iso-2022-jp"),
    "utf-7": b"# coding: utf-7\ns = '+AOk-'\n",
    "byte-order mark": BOM + "s = 'é'\n".encode(),
    "byte-order mark and declaration": BOM + "# coding: UTF_8\ns = 'é'\n".encode(),
    "empty": b"",
    "one line": b"# coding: latin-1",
    "other bytes beside the declaration": b"# Jos\xe9 -*- coding: cp1252 -*-\ns = '\x80'\n",
    "other bytes above the declaration": b"# Jos\xe9\n# coding: cp1252\ns = '\x80'\n",
}
WRONG = {
    "not UTF-8": (b"s = 1\ns = 2\ns = '\xe9'\n", NOT_UTF8, "byte 17: "),
    "not UTF-8 in the first line": (b"s = '\xe9'\n", NOT_UTF8, "byte 5: "),
    "unknown": (b"# coding: klingon-8\nx = 1\n", UNKNOWN_ENCODING, "klingon-8"),
    "unknown, with a mark": (BOM + b"# coding: klingon-8\nx = 1\n", UNKNOWN_ENCODING, "klingon-8"),
    "no text": (b"# coding: rot13\nx = 1\n", UNKNOWN_ENCODING, "rot13"),
    "compressed": (b"# coding: zlib\nx = 1\n", UNKNOWN_ENCODING, "zlib"),
    "contradiction": (BOM + b"# coding: latin-1\nx = 1\n", CONTRADICTORY_ENCODING, "iso-8859-1"),
    "not what it declares": (b"# coding: ascii\nx = '\xe9'\n", WRONG_ENCODING, "ascii"),
    "wide": (b"# coding: utf-16\nx = 1\n", WRONG_ENCODING, "utf-16"),
    "of host names": (b"# coding: punycode -" + b"a" * 1_000_000, WRONG_ENCODING, "punycode"),
    "lone surrogate": (b"# coding: unicode_escape\nx = '\\ud800'\n", WRONG_ENCODING, "unicode_escape"),
}


@pytest.mark.parametrize("name", RIGHT)
def test_python_is_decoded_as_by_the_tokenizer(name: str) -> None:
    data = RIGHT[name]
    # `tokenize` wants UTF-8 beside the declaration; the interpreter does not.
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data.replace(b"Jos\xe9", b"Jose")).readline)
    for path in ("a.py", "a.PYI"):
        assert decode_source(data, path) == data.decode(encoding)
    assert not decode_source(data, "a.py").startswith("\ufeff")


def test_python_is_decoded_as_by_the_interpreter(tmp_path: Path) -> None:
    """The interpreter itself shows what it reads, or refuses the file."""
    for number, data in enumerate([*RIGHT.values(), *(data for data, _, _ in WRONG.values())]):
        if b"unicode_escape" not in data and b"'" in data:
            (tmp_path / f"m{number}.py").write_bytes(data)
    code = "import sys, importlib\nfor name in sys.argv[1:]:\n"
    code += "    try: print(name, ascii(importlib.import_module(name).s))\n    except SyntaxError: print(name)"
    names = sorted(path.stem for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    for line in done.stdout.splitlines():
        name, _, shown = line.partition(" ")
        try:
            text = decode_source((tmp_path / f"{name}.py").read_bytes(), f"{name}.py")
        except EncodingError:
            assert not shown, name
        else:
            assert shown and ast.literal_eval(shown) == ast.literal_eval(text.partition("s = ")[2].strip()), name


def test_other_files_are_in_utf8_whatever_they_say() -> None:
    assert decode_source("# coding: latin-1\né".encode(), "a.rb") == "# coding: latin-1\né"
    with pytest.raises(EncodingError, match=NOT_UTF8):
        decode_source(RIGHT["latin-1"], "a.rb")


def test_line_ends_stay() -> None:
    assert decode_source(b"# coding: latin-1\r\ns = '\xe9'\r", "a.py") == "# coding: latin-1\r\ns = 'é'\r"


@pytest.mark.parametrize("name", WRONG)
def test_what_python_would_refuse_is_named(name: str) -> None:
    data, reason, detail = WRONG[name]
    with pytest.raises(EncodingError) as raised:
        decode_source(data, "a.py")
    assert raised.value.reason == reason and raised.value.detail.startswith(detail)


def test_collected_and_read_files_are_decoded_alike(tmp_path: Path) -> None:
    """Undecodable files are counted by reason and named with the detail; nothing else is lost."""
    source = tmp_path / "src"
    source.mkdir()
    right = {name: data for name, data in RIGHT.items() if data}
    for number, data in enumerate([*right.values(), *(data for data, _, _ in WRONG.values())]):
        (source / f"{number:02d}.py").write_bytes(data)
    manifest = collect(tmp_path / "corpus", [source], max_file_bytes=2_000_000)
    texts = sorted(decode_source(data, "a.py") for data in right.values())
    assert sorted(d.text for d in Corpus.open(tmp_path / "corpus")) == texts
    reasons = [reason for _, reason, _ in WRONG.values()]
    assert manifest["skipped"] == {reason: reasons.count(reason) for reason in sorted(set(reasons))}
    listed = (tmp_path / "corpus" / "rejected.jsonl").read_text()
    assert '"unknown encoding","detail":"klingon-8"' in listed
    reads = [read for piece in find_inputs([str(source)], ".py") for read in read_documents(piece)]
    assert sorted(read.text for read in reads if isinstance(read, Document)) == texts
    bad = [read.reason for read in reads if isinstance(read, BadDocument)]
    assert len(bad) == len(WRONG) and "unknown encoding (klingon-8)" in bad
