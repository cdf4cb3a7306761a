"""Send a finished directory to the Hugging Face Hub, in one commit: a branch there has the whole of it or none.

Only `huggingface_hub` talks to the Hub. It finds the token itself, in the environment (HF_TOKEN) or the file of
`hf auth login`; nothing here reads it but to keep it out of messages.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from codeparrot_ds.errors import ConfigError, DataError
from codeparrot_ds.export import certificate as certificates
from codeparrot_ds.system.files import MANIFEST, read_json
from codeparrot_ds.system.jobs import say

DEFAULT_TRIES, DEFAULT_TIMEOUT_SECONDS = 6, 120.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 120.0
_OF_MODELS = (".safetensors", ".bin", ".pt", ".index.json")  # from an earlier push; loaded in place of what is new
_REPO_TYPES = {"shards": "dataset", "corpus": "dataset", "tokenizer": "model"}  # by the kind of their manifest
_MAIN = "main"
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write there."


@dataclass(frozen=True)
class Pushed:
    """What lies on the Hub now.

    Attributes:
        repo: its id, with its owner.
        repo_type: "model" or "dataset".
        branches: those that hold the directory.
        commits: of each branch, its newest.
        files: sent or found there.
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
    """Send a converted model, a tokenizer, or finished shards or a corpus.

    What has arrived before a fault is not sent again, in this call or in the next.

    Args:
        directory: what to send; a converted model is held against its certificate first.
        repo: "owner/name", or "name" for one's own; made when it does not exist.
        branch: to send to, made when it does not exist; "main" when left out.
        merge: bring it to main too, where files of an earlier model go.
        private: whether a repository that is made here is for its owner alone.
        tries: in all, when the network or the Hub fails; pauses between them grow.
        timeout_seconds: a connection on which nothing has moved for so long has failed.

    Raises:
        ConfigError: bad names, no token or no rights, or the Hub cannot be reached.
        DataError, CheckpointError: the directory is none of those, or not what was proved.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    repo_type, names = _contents(directory)
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
            commits.append(hub.call(_commit, api, url.repo_id, repo_type, target, directory, names))
    except HFValidationError as error:
        raise ConfigError(f"{repo}: not a name for a repository ({hub.clean(error)}). Write OWNER/NAME.") from None
    return Pushed(url.repo_id, repo_type, targets, commits, len(names))


def _limit_silence(seconds: float) -> None:
    """Left alone, `huggingface_hub` waits for ever for a Hub that says nothing, and some of its calls insist on it."""
    from huggingface_hub import get_session, set_client_factory

    usual = get_session()

    def limit(request: Any) -> None:
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)

    def client() -> Any:
        hooks = {**usual.event_hooks, "request": [*usual.event_hooks["request"], limit]}
        return type(usual)(event_hooks=hooks, follow_redirects=True, timeout=None)

    set_client_factory(client)


def _contents(directory: Path) -> tuple[str, list[str]]:
    """(type of repository, files to send) of what `directory` is. Raises DataError or CheckpointError."""
    if (directory / certificates.CERTIFICATE).is_file():
        certificate = certificates.check(directory)
        return "model", sorted([*certificate["files"], certificates.CERTIFICATE])
    names = sorted(
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(directory).parts)
    )
    if MANIFEST in names:
        kind = read_json(directory / MANIFEST, "manifest").get("kind")
        if kind in _REPO_TYPES:
            return _REPO_TYPES[kind], names
    elif "tokenizer.json" in names and not any(name.endswith(_OF_MODELS) for name in names):
        return "model", names
    raise DataError(
        f"{directory}: neither a converted model (`codeparrot-ds convert`) nor a tokenizer, nor finished shards or a "
        "finished corpus."
    )


def _commit(api: Any, repo: str, repo_type: str, branch: str, directory: Path, names: list[str]) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    there = api.list_repo_files(repo, repo_type=repo_type, revision=branch)
    old = [name for name in there if name not in names and name.endswith(_OF_MODELS) and repo_type == "model"]
    operations = [
        *(CommitOperationDelete(name) for name in old),
        *(CommitOperationAdd(name, str(directory / name)) for name in names),
    ]
    commit = api.create_commit(
        repo, operations, commit_message=f"{directory.name}: {len(names)} files", repo_type=repo_type, revision=branch
    )
    return str(commit.oid)


class _Patient:
    """Calls to the Hub that are tried again when the network or the Hub fails."""

    def __init__(self, repo: str, tries: int) -> None:
        self._repo, self._tries = repo, tries

    def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """The function's result. Raises ConfigError once it is certain, or has failed too often."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

        pause = _FIRST_PAUSE_SECONDS
        for number in range(1, self._tries + 1):
            try:
                return function(*arguments, **named)
            except OfflineModeIsEnabled:
                raise ConfigError("HF_HUB_OFFLINE is set in the environment, so nothing can be sent.") from None
            except LocalTokenNotFoundError:
                raise ConfigError(f"{self._repo}: no token here. {_LOG_IN}") from None
            except HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403):
                    raise ConfigError(f"{self._repo}: the Hub refuses ({status}). {_LOG_IN}") from None
                if 400 <= status < 500 and status not in (408, 409, 412, 429):
                    raise ConfigError(f"{self._repo}: the Hub refuses ({self.clean(error)}).") from None
                reason = self.clean(error)
            except (HTTPError, ConnectionError, TimeoutError) as error:
                reason = self.clean(error)
            except RuntimeError as error:  # what huggingface_hub makes of a failed upload
                reason = self.clean(error.__cause__ if isinstance(error.__cause__, Exception) else error)
            if number < self._tries:
                wait = pause * random.uniform(0.5, 1.0)
                say(f"note: {self._repo}: try {number} of {self._tries} failed ({reason}); again in {wait:.0f} s")
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
        raise ConfigError(
            f"{self._repo}: the Hub cannot be reached, or fails ({reason}). What has arrived stays there: run the same "
            "command again."
        )

    def clean(self, error: Exception) -> str:
        """One line of an error, without the token."""
        from huggingface_hub import get_token

        text = " ".join((str(error) or type(error).__name__).split())
        token = get_token()
        return (text.replace(token, "hf_***") if token else text)[:300]
