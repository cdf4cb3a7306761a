"""Write many .json.gz files with the fields of CodeParrot's dataset: one JSON object per line.

The text is the Python source of this interpreter's standard library and installed packages. When it is used up, it
is read again as version 2, 3, ... of each file, in which a third of the longer identifiers have another name, so that
no version is a near-duplicate of another.

Usage: python make_json_gz.py DIRECTORY [--files 1000] [--megabytes 2100]
"""

import argparse
import gzip
import itertools
import json
import re
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

_LONGER_IDENTIFIER = re.compile(r"[A-Za-z_]\w{4,}")
_MAX_BYTES = 1_000_000
_LICENCES = ("mit", "apache-2.0", "bsd-3-clause", "gpl-3.0")


def sources() -> list[tuple[Path, str]]:
    """Each Python file of this interpreter with its path below the directory in which it was found, sorted."""
    found: dict[Path, str] = {}
    for key in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(key)).resolve()
        for path in sorted(root.rglob("*.py")):
            if path.is_file() and 0 < path.stat().st_size <= _MAX_BYTES:
                found.setdefault(path, path.relative_to(root).as_posix())
    return sorted(found.items())


def version_of(text: str, version: int) -> str:
    """`text` in which a third of the longer identifiers are renamed for this version; version 1 is `text` itself."""
    if version == 1:
        return text

    def rename(match: re.Match[str]) -> str:
        word = match[0]
        return f"{word}_{version}" if (zlib.crc32(word.encode()) + version) % 3 == 0 else word

    return _LONGER_IDENTIFIER.sub(rename, text)


def rows() -> Iterator[dict[str, str]]:
    """Rows without end."""
    files = sources()
    for version in itertools.count(1):
        for number, (path, name) in enumerate(files):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue
            package = name.partition("/")[0].removesuffix(".py")
            yield {
                "repo_name": f"{package}/v{version}",
                "path": name,
                "copies": "1",
                "size": str(len(text.encode())),
                "content": version_of(text, version),
                "license": _LICENCES[(number + version) % len(_LICENCES)],
            }


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--megabytes", type=int, default=2100, help="of text in all files together")
    options = parser.parse_args()
    options.directory.mkdir(parents=True)
    each = options.megabytes * 1_000_000 // options.files
    endless, documents, total = rows(), 0, 0
    for number in range(options.files):
        written = 0
        with gzip.open(
            options.directory / f"file-{number:012d}.json.gz", "wt", compresslevel=4, encoding="utf-8"
        ) as out:
            while written < each:
                row = next(endless)
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += len(row["content"].encode())
                documents += 1
        total += written
    print(f"{options.files:,} files, {documents:,} documents, {total / 1e9:.2f} GB of text")


if __name__ == "__main__":
    main()
