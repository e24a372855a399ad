"""Models on the Hugging Face hub: only the weights that will be read and the small files beside them."""

from __future__ import annotations

import contextlib
import glob
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mergeid.basics.reading import read_json
from mergeid.errors import MergeidError
from mergeid.io.beside import is_companion
from mergeid.io.folders import PICKLES, SAFETENSORS, contents, find_weights, inside, read_index

PATIENCE = 10.0
"""Seconds without a sign of life after which the hub counts as unreachable."""
_ID = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?$")


def is_id(source: str) -> bool:
    """Whether a name is that of a repository on the hub, and of nothing here."""
    return _ID.match(source) is not None and not Path(source).exists()


def download(source: str, *, revision: str | None = None, allow_pickle: bool = False) -> Path:
    """Fetch a model into the local cache (or find it there) and return its folder.

    Honours ``HF_ENDPOINT``, ``HF_HUB_OFFLINE``, ``HF_HOME`` and the stored token, as huggingface_hub does. Where
    the hub cannot be reached, a copy in the cache is used.

    Args:
        source: ``org/name`` or ``org/name@revision``.
        revision: branch, tag or commit; wins over nothing, clashes with ``@revision``.
        allow_pickle: fetch ``.bin`` weights where there are no others.

    Raises:
        MergeidError: not an id, not found, no such revision, gated, offline, or no weights in it.
    """
    match = _ID.match(source)
    if match is None:
        raise MergeidError(
            f"no such file or folder: {source}; and it is not a hub id either (org/name or org/name@revision)"
        )
    repo, named = match["id"], match["revision"]
    if named and revision and named != revision:
        raise MergeidError(f"{source} names the revision {named} and --revision names {revision}; give only one")
    revision = revision or named
    with Patience().applied():
        return _fetch(repo, revision, allow_pickle)


def _fetch(repo: str, revision: str | None, allow_pickle: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    try:
        siblings = HfApi().model_info(repo, revision=revision, timeout=PATIENCE).siblings or []
    except Exception as error:  # huggingface_hub, its HTTP client (which has changed) and the socket layer
        if _unreachable(error):
            return _cached(repo, revision, error)
        raise MergeidError(_explain(error, repo, revision)) from None
    names = [s.rfilename for s in siblings]

    def get(wanted: Iterable[str]) -> Path:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_exactly(wanted)))

    try:
        found = contents(names, lambda name: read_json(get([name]) / name))
        parts = ("",) if found is None else found.folders
        weights = {
            p: find_weights(inside(names, p), f"{repo}/{p}".rstrip("/"), allow_pickle=allow_pickle) for p in parts
        }
        beside = [n for n in names if is_companion(n, of_parts=found is not None)]
        folder = get([*beside, *(f"{p}/{w.name}".lstrip("/") for p, w in weights.items())])
        shards = {
            f"{p}/{shard}".lstrip("/")
            for p, w in weights.items()
            if w.listing is not None
            for shard in read_index(folder / p / w.listing)[0].values()
        }
        if shards:
            get(shards)
    except MergeidError:
        raise
    except Exception as error:
        raise MergeidError(_explain(error, repo, revision)) from None
    return folder


class Patience:
    """Gives every request of huggingface_hub a time limit, since some of its calls have none, and ends its retries
    where nothing was answered meanwhile."""

    def __init__(self) -> None:
        self._waiting: float | None = None
        """Since when no request was answered."""

    def asked(self, request: Any) -> None:
        now = time.monotonic()
        if self._waiting is None:
            self._waiting = now
        elif now - self._waiting > PATIENCE:
            raise TimeoutError(f"no answer in {PATIENCE:.0f} seconds")
        given = request.extensions.get("timeout") or {}
        limits = {kind: given.get(kind) or PATIENCE for kind in ("connect", "read", "write", "pool")}
        request.extensions["timeout"] = limits

    def answered(self, response: Any) -> None:
        self._waiting = None

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """While open, to the client that huggingface_hub shares (versions before 1 have another, with its own)."""
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        hooks = getattr(get_session(), "event_hooks", None)
        if hooks is None:
            yield
            return
        added = [(hooks["request"], self.asked), (hooks["response"], self.answered)]
        for row, hook in added:
            row.append(hook)
        try:
            yield
        finally:
            for row, hook in added:
                row.remove(hook)


def _exactly(names: Iterable[str]) -> list[str]:
    return [glob.escape(name) for name in names]


def _cached(repo: str, revision: str | None, reason: Exception) -> Path:
    """The folder of an earlier download, if it has weights."""
    from huggingface_hub import snapshot_download

    folder: str | None
    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
    except OSError as error:
        # Newer versions know that we never fetch the whole repository, and hand over what there is.
        folder = getattr(error, "snapshot_path", None)
    if folder is None or not any(p.name.endswith((SAFETENSORS, *PICKLES)) for p in Path(folder).iterdir()):
        raise MergeidError(_explain(reason, repo, revision)) from None
    return Path(folder)


def _unreachable(error: Exception) -> bool:
    """Whether the hub did not answer (offline mode, no network, time-out, server error)."""
    if (status := status_of(error)) is not None:
        return status >= 500
    client = type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return client or isinstance(error, (ConnectionError, TimeoutError))


def status_of(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _explain(error: Exception, repo: str, revision: str | None) -> str:
    """One sentence for what went wrong."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/{repo}"
    if constants.HF_HUB_OFFLINE:
        return f"{repo} is not in the local cache and HF_HUB_OFFLINE is set; unset it, or name a folder on this machine"
    if isinstance(error, GatedRepoError):  # before its parent, "not found"
        return f"{repo} is gated: request access at {page}, then log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"no such file or folder: {repo}; and {constants.ENDPOINT} has no model with that id, or it is private "
            "(then log in with `hf auth login` or set HF_TOKEN)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; expected a branch, tag or commit listed at {page}"
    if isinstance(error, HFValidationError):
        return f"no such file or folder: {repo}; and it is not a valid hub id either (org/name)"
    if isinstance(error, LocalEntryNotFoundError) or _unreachable(error):
        status = status_of(error)
        why = f"answered with status {status}" if status else "cannot be reached"
        return (
            f"no such file or folder: {repo}; as a hub id it is not in the local cache and {constants.ENDPOINT} {why}: "
            "check the path or the network"
        )
    if (status := status_of(error)) is not None:
        return f"{page} could not be read: the hub answered with status {status}; check the id and your token"
    reason = str(error).split("\n", 1)[0]
    return f"{repo} could not be fetched from {constants.ENDPOINT}: {reason or type(error).__name__}"
