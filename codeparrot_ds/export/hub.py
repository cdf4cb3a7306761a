"""Push a finished directory to the Hugging Face Hub in one commit, so that a branch has all of it or nothing.

Only `huggingface_hub` talks to the Hub. It finds the token itself, in the environment (HF_TOKEN) or in the file of
`hf auth login`; this module reads it only to keep it out of messages.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.corpus.card import CARD, complete_card
from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.export import certificate as certificates
from codeparrot_ds.system.files import MANIFEST, read_json
from codeparrot_ds.system.inputs_record import INPUTS_RECORD
from codeparrot_ds.system.jobs import say

DEFAULT_TRIES, DEFAULT_TIMEOUT_SECONDS = 6, 120.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 120.0
_OF_MODELS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".index.json",
)  # if left from an earlier push, they could be loaded instead of the new files
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
    tries: int = DEFAULT_TRIES,
    timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
) -> Pushed:
    """Push a converted model, a tokenizer, or finished shards or a corpus.

    Data that arrived before a failure is not sent again, in this call or the next.

    Args:
        directory: directory to push; a converted model is verified against its certificate first.
        repo: "owner/name", or "name" for the user's own; created if missing.
        branch: branch to push to, created if missing; "main" by default.
        merge: also push to main, where files of an earlier model are removed.
        private: whether a newly created repository is private.
        tries: maximum attempts when the network or the Hub fails, with growing pauses.
        timeout_seconds: a connection without data transfer for this long has failed.

    Raises:
        ConfigError: invalid names, no token or no permission, or the Hub cannot be reached.
        DataError, CheckpointError: the directory is none of those, or does not match its certificate.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    repo_type, names = _contents(directory)
    card = _card(directory, repo_type)
    names = sorted({*names, *card})
    _limit_silence(timeout_seconds)
    api = HfApi(library_name="codeparrot-ds")
    targets = [branch or _MAIN, *([_MAIN] if merge and branch not in (None, _MAIN) else [])]
    hub = _Patient(repo, tries)
    try:
        url = hub.call(api.create_repo, repo, repo_type=repo_type, private=private, exist_ok=True)
        commits = []
        for target in targets:
            if target != _MAIN:
                hub.call(api.create_branch, url.repo_id, branch=target, repo_type=repo_type, exist_ok=True)
            commits.append(hub.call(_commit, api, url.repo_id, repo_type, target, directory, names, card))
    except HFValidationError as error:
        raise ConfigError(f"{repo}: not a valid repository name ({hub.clean(error)}). Use OWNER/NAME.") from None
    return Pushed(url.repo_id, repo_type, targets, commits, len(names))


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


def _contents(directory: Path) -> tuple[str, list[str]]:
    """Return (repository type, files to push) for `directory`. Raises DataError or CheckpointError."""
    if (directory / certificates.CERTIFICATE).is_file():
        certificate = certificates.verify(directory)
        return "model", sorted([*certificate["files"], certificates.CERTIFICATE])
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    names = [name for name in names if name not in _LOCAL]
    if MANIFEST in names:
        kind = read_json(directory / MANIFEST, "manifest").get("kind")
        if kind in _REPO_TYPES:
            return _REPO_TYPES[kind], names
    elif "tokenizer.json" in names and not any(name.endswith(_OF_MODELS) for name in names):
        return "model", names
    raise DataError(
        f"{directory}: not a converted model (`codeparrot-ds convert`), a tokenizer, finished shards or a finished "
        "corpus."
    )


def _card(directory: Path, repo_type: str) -> dict[str, bytes]:
    """The dataset card by its name, if it has to differ from the one in `directory`: a missing or incomplete one."""
    if repo_type != "dataset":
        return {}
    path = directory / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    kind = read_json(directory / MANIFEST, "manifest")["kind"]
    complete = complete_card(text) if kind == "corpus" else text or _SHARDS_CARD
    return {CARD: complete.encode()} if complete != text else {}


def _commit(
    api: Any, repo: str, repo_type: str, branch: str, directory: Path, names: list[str], card: dict[str, bytes]
) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repo, repo_type=repo_type, revision=branch)
    if CARD in card and CARD in there and not (directory / CARD).is_file():
        names = [name for name in names if name != CARD]  # written by the repository's owner, or by an earlier push
    old = [name for name in there if name not in names and name.endswith(_OF_MODELS) and repo_type == "model"]
    operations = [
        *(CommitOperationDelete(name) for name in old),
        *(CommitOperationAdd(name, card.get(name) or str(directory / name)) for name in names),
    ]
    commit = api.create_commit(
        repo, operations, commit_message=f"{directory.name}: {len(names)} files", repo_type=repo_type, revision=branch
    )
    return str(commit.oid)


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
