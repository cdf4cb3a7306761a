"""Push a finished directory to the Hugging Face Hub in one commit, so that a branch has all of it or nothing.

Only `huggingface_hub` talks to the Hub. It finds the token itself, in the environment (HF_TOKEN) or in the file of
`hf auth login`; this module reads it only to keep it out of messages.
"""

import random
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.corpus.card import CARD, split_card
from codeparrot_ds.corpus.split import split_corpus
from codeparrot_ds.documents.inputs import Corpus
from codeparrot_ds.documents.splits import VALID_FRACTION, require_fraction
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.export import certificate as certificates
from codeparrot_ds.system.files import MANIFEST, exclusive_lock, make_directory, read_json
from codeparrot_ds.system.inputs_record import INPUTS_RECORD
from codeparrot_ds.system.jobs import say

Manifest = dict[str, Any]

DEFAULT_TRIES, DEFAULT_TIMEOUT_SECONDS = 6, 120.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 120.0
# Files that could be loaded instead of the new ones, or beside them, if left from an earlier push.
_OF_MODELS = re.compile(r"\.(?:safetensors|bin|pt|index\.json)$")
_OF_CORPORA = re.compile(r"^(?:documents|train|validation)-\d{5,}\.(?:jsonl\.gz|jsonl\.zst|parquet)$")
_NOTHING = re.compile(r"(?!)")
_REPO_TYPES = {"shards": "dataset", "corpus": "dataset", "tokenizer": "model"}  # by the kind in the manifest
_LOCAL = {INPUTS_RECORD}  # paths and times of files on this machine
_MAIN = "main"
_SHARDS_CARD = """---
viewer: false
---

# Token ids

Memory-mapped shards of token ids in Megatron-LM's format, with their tokenizer; not a table that `datasets` can load.
Made by `codeparrot-ds shards build`. Train on them with `data: {shards: PATH}` in a recipe of codeparrot-ds, after
`hf download --repo-type dataset OWNER/NAME --local-dir PATH`.
"""
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token with write access."


@dataclass(frozen=True)
class Pushed:
    """Result of a push.

    Attributes:
        repo: repository id, with its owner.
        repo_type: "model" or "dataset".
        branches: branches that hold the directory.
        commits: newest commit of each branch.
        files: number of files sent or already there.
    """

    repo: str
    repo_type: str
    branches: list[str]
    commits: list[str]
    files: int


def push(
    directory: Path,
    repo: str,
    *,
    branch: str | None = None,
    merge: bool = False,
    private: bool = True,
    valid_fraction: float | None = None,
    tries: int = DEFAULT_TRIES,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> Pushed:
    """Push a converted model, a tokenizer, or finished shards or a corpus, which is split into train and validation.

    Data that arrived before a failure is not sent again, in this call or the next.

    Args:
        directory: directory to push; a converted model is verified against its certificate first.
        repo: "owner/name", or "name" for the user's own; created if missing.
        branch: branch to push to, created if missing; "main" by default.
        merge: also push to main, where files of an earlier model are removed.
        private: whether a newly created repository is private.
        valid_fraction: share of the documents of a corpus in its validation split; None for that of `shards build`.
        tries: maximum attempts when the network or the Hub fails, with growing pauses.
        timeout_seconds: a connection without data transfer for this long has failed.

    Raises:
        ConfigError: invalid names, no token or no permission, or the Hub cannot be reached.
        DataError, CheckpointError: the directory is none of those, or does not match its certificate.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    repo_type, kind, names = _contents(directory)
    if kind != "corpus" and valid_fraction is not None:
        raise ConfigError(f"--valid-fraction is for a corpus, and {directory} is none. Omit it.")
    fraction = VALID_FRACTION if valid_fraction is None else valid_fraction
    require_fraction(fraction)
    corpus = Corpus.open(directory) if kind == "corpus" else None
    _limit_silence(timeout_seconds)
    api = HfApi(library_name="codeparrot-ds")
    targets = [branch or _MAIN, *([_MAIN] if merge and branch not in (None, _MAIN) else [])]
    hub = _Patient(repo, tries)
    with ExitStack() as stack:
        try:
            url = hub.call(api.create_repo, repo, repo_type=repo_type, private=private, exist_ok=True)
            split = None if corpus is None else stack.enter_context(_split(corpus, names, fraction))
            files, manifest = split or ({name: directory / name for name in names}, None)
            commits = []
            for target in targets:
                if target != _MAIN:
                    hub.call(api.create_branch, url.repo_id, branch=target, repo_type=repo_type, exist_ok=True)
                pushing = _Push(api, url.repo_id, repo_type, target, directory.name)
                commits.append(hub.call(pushing.commit, files, manifest))
        except HFValidationError as error:
            raise ConfigError(f"{repo}: not a valid repository name ({hub.clean(error)}). Use OWNER/NAME.") from None
    return Pushed(url.repo_id, repo_type, targets, commits, len({*files, CARD} if repo_type == "dataset" else files))


def _limit_silence(seconds: float) -> None:
    """Set a timeout on all requests: by default `huggingface_hub` waits forever, and some of its calls enforce that."""
    from huggingface_hub import get_session, set_client_factory

    usual = get_session()

    def limit(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def client() -> Any:
        hooks = {**usual.event_hooks, "request": [*usual.event_hooks["request"], limit]}
        return type(usual)(event_hooks=hooks, follow_redirects=True, timeout=None)

    set_client_factory(client)


def _contents(directory: Path) -> tuple[str, str, list[str]]:
    """Return (repository type, kind, files to push) for `directory`. Raises DataError or CheckpointError."""
    if (directory / certificates.CERTIFICATE).is_file():
        certificate = certificates.verify(directory)
        return "model", "model", sorted([*certificate["files"], certificates.CERTIFICATE])
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    names = [name for name in names if name not in _LOCAL]
    if MANIFEST in names:
        kind = read_json(directory / MANIFEST, "manifest").get("kind")
        if kind in _REPO_TYPES:
            return _REPO_TYPES[kind], kind, names
    elif "tokenizer.json" in names and not any(map(_OF_MODELS.search, names)):
        return "model", "tokenizer", names
    raise DataError(
        f"{directory}: not a converted model (`codeparrot-ds convert`), a tokenizer, finished shards or a finished "
        "corpus."
    )


@contextmanager
def _split(corpus: Corpus, names: Sequence[str], valid_fraction: float) -> Iterator[tuple[dict[str, Path], Manifest]]:
    """Split a corpus in a hidden directory below it. Yields the files to push by name, and the manifest."""
    directory = corpus.directory
    files = {name: directory / name for name in names}
    if corpus.manifest.get("valid_fraction") == valid_fraction:  # a split corpus from the Hub
        yield files, corpus.manifest
        return
    busy = f"{directory}: another process is pushing this corpus. Wait for it, or stop it."
    scratch = directory / ".push"
    make_directory(scratch)
    with exclusive_lock(directory / ".push.lock", busy):
        for leftover in scratch.iterdir():  # of a process that was killed
            leftover.unlink()
        try:
            manifest = split_corpus(corpus, scratch, valid_fraction)
            for split, documents in manifest["splits"].items():
                if not documents:
                    say(f"note: {directory}: no document is in {split} at --valid-fraction {valid_fraction}.")
            for file in corpus.files:
                del files[file.relative_to(directory).as_posix()]
            yield files | {path.name: path for path in scratch.iterdir()}, manifest
        finally:
            shutil.rmtree(scratch)
    (directory / ".push.lock").unlink(missing_ok=True)


@dataclass(frozen=True)
class _Push:
    """A commit to a branch of a repository."""

    api: Any
    repo: str
    repo_type: str
    branch: str
    title: str

    def commit(self, files: Mapping[str, Path], split: Manifest | None) -> str:
        """Push files, and the card of a dataset; `split` is the manifest of a split corpus. Returns the commit."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self.api.list_repo_files(self.repo, repo_type=self.repo_type, revision=self.branch)
        contents: dict[str, str | bytes] = {name: str(path) for name, path in files.items()}
        if self.repo_type == "dataset" and (card := self._card(files.get(CARD), split, there)):
            contents[CARD] = card.encode()
        replaced = {"model": _OF_MODELS, "dataset": _OF_CORPORA if split is not None else _NOTHING}[self.repo_type]
        old = [name for name in there if name not in contents and replaced.search(name)]
        operations = [
            *(CommitOperationDelete(name) for name in old),
            *(CommitOperationAdd(name, contents[name]) for name in sorted(contents)),
        ]
        commit = self.api.create_commit(
            self.repo,
            operations,
            commit_message=f"{self.title}: {len(contents)} files",
            repo_type=self.repo_type,
            revision=self.branch,
        )
        return str(commit.oid)

    def _card(self, own: Path | None, split: Manifest | None, there: Sequence[str]) -> str:
        """The dataset card to push; "" if the one in the directory or on the Hub needs no change.

        One on the Hub was written by the repository's owner, or by an earlier push.
        """
        if own is not None:
            text = own.read_text(encoding="utf-8", errors="replace")
        elif CARD not in there:
            text = ""
        elif split is None:
            return ""
        else:
            with tempfile.TemporaryDirectory() as directory:
                path = self.api.hf_hub_download(
                    self.repo, CARD, repo_type=self.repo_type, revision=self.branch, local_dir=directory
                )
                text = Path(path).read_text(encoding="utf-8", errors="replace")
        complete = text or _SHARDS_CARD if split is None else split_card(text, split)
        return complete if complete != text or own is None else ""


class _Patient:
    """Calls the Hub, with retries when the network or the Hub fails."""

    def __init__(self, repo: str, tries: int) -> None:
        self._repo, self._tries = repo, tries

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Return the function's result. Raises ConfigError on a permanent failure, or after too many attempts."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        pause = _FIRST_PAUSE_SECONDS
        for number in range(1, self._tries + 1):
            try:
                return function(*arguments, **named)
            except OfflineModeIsEnabled:
                raise ConfigError(
                    "HF_HUB_OFFLINE is set in the environment, so nothing can be pushed. Unset it."
                ) from None
            except LocalTokenNotFoundError:
                raise ConfigError(f"{self._repo}: no token found. {_LOG_IN}") from None
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403):
                    raise ConfigError(f"{self._repo}: the Hub denies access ({status}). {_LOG_IN}") from None
                if 400 <= status < 500 and status not in (408, 409, 412, 429):
                    raise ConfigError(f"{self._repo}: the Hub rejects the request ({self.clean(error)}).") from None
                reason = self.clean(error)
            except (HTTPError, ConnectionError, TimeoutError) as error:
                reason = self.clean(error)
            except RuntimeError as error:  # raised by huggingface_hub for a failed upload
                reason = self.clean(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            if number < self._tries:
                wait = pause * random.uniform(0.5, 1.0)
                say(
                    f"note: {self._repo}: attempt {number} of {self._tries} failed ({reason}); retrying in {wait:.0f} s"
                )
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise ConfigError(
            f"{self._repo}: the Hub cannot be reached, or fails ({reason}). Uploaded data is kept: run the same "
            "command again."
        )

    def clean(self, error: Exception) -> str:
        """Return an error as one line, without the token."""
        from huggingface_hub import get_token

        text = " ".join((str(error) or type(error).__name__).split())
        token = get_token()
        return (text.replace(token, "hf_***") if token else text)[:300]
