"""Onto the Hugging Face hub: a finished output as one commit, so that the hub has all of it or nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mergeid.errors import MergeidError, reason
from mergeid.io.hub import Patience, status_of

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_push(repo: str) -> None:
    """Whether the hub knows who we are, asked before long work.

    Raises:
        MergeidError: no id of a repository, no valid token, or the hub does not answer.
    """
    from huggingface_hub import HfApi, constants

    if not _ID.fullmatch(repo):
        raise MergeidError(f"--push {repo} is not a hub id; expected org/name")
    if constants.HF_HUB_OFFLINE:
        raise MergeidError("--push needs the hub, but HF_HUB_OFFLINE is set; unset it")
    try:
        with Patience().applied():
            HfApi().whoami()
    except Exception as error:  # huggingface_hub, its HTTP client and the socket layer
        if status_of(error) in (None, 401, 403) and "token" in str(error).lower():
            raise MergeidError(
                f"--push {repo}: {constants.ENDPOINT} needs a token with write access; log in with `hf auth login` or "
                "set HF_TOKEN"
            ) from None
        raise MergeidError(f"--push {repo}: {_said(error)}") from None


def push(repo: str, files: Mapping[str, Path | bytes], message: str) -> str:
    """Commit files to a model repository, which is made if there is none, and return its address.

    Args:
        files: name in the repository -> a file here, or its content.

    Raises:
        MergeidError: what the hub says against it; then no file was added there, and the files lie here as before.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content if isinstance(content, bytes) else str(content))
        for name, content in files.items()
    ]
    api, sent = HfApi(), False
    try:
        with Patience().applied():
            address = api.create_repo(repo, repo_type="model", exist_ok=True)
            api.preupload_lfs_files(repo, additions=operations)  # what lies there without a commit is in no repository
            sent = True
            api.create_commit(repo, operations=operations, commit_message=message)
    except Exception as failure:
        error = _cause(failure)
        arrived = sent and status_of(error) is None  # the answer is lost, and perhaps not the commit
        there = "the commit may have arrived" if arrived else "no file was added there"
        raise MergeidError(f"--push {repo}: {_said(error)}; {there}, and the output is still on this machine") from None
    return str(address)


def _cause(error: Exception) -> Exception:
    """What went wrong with a large file: huggingface_hub puts "Error while uploading …" around it."""
    cause = error.__cause__
    return cause if type(error) is RuntimeError and isinstance(cause, Exception) else error


def _said(error: Exception) -> str:
    from huggingface_hub import constants

    status = status_of(error)
    if status in (401, 403):
        return f"{constants.ENDPOINT} refuses the upload (status {status}); check the name and your token"
    if status is not None:
        return f"{constants.ENDPOINT} answered with status {status}; try again"
    if isinstance(error, ValueError):  # what huggingface_hub says of an answer: a quota, a file too large
        return f"{constants.ENDPOINT} does not take the files ({reason(error)})"
    return f"{constants.ENDPOINT} could not be used ({reason(error)}); check the network"
