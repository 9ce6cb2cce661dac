"""What a user names as data to files on this machine: a file, a glob, a folder, a hub data set, a remote address."""

from __future__ import annotations

import glob
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kitae.data.readers import READERS
from kitae.errors import DataError, MissingExtraError

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w./-]+)?")
_URL = re.compile(r"[a-z][a-z0-9+]*://")


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to read and the name messages use for it."""

    path: Path
    name: str
    keeps: Any = None
    """Whatever must live as long as the file does: a temporary folder, for a remote one."""


def expand(paths: Sequence[str], *, split: str) -> list[DataFile]:
    """All files that the paths name, in order; a name that leads nowhere is an error."""
    if not paths:
        raise DataError("no data given; set data.train to files, folders, globs or hub names")
    return [file for path in paths for file in _expand_one(str(path), split)]


def _expand_one(path: str, split: str) -> list[DataFile]:
    if _URL.match(path):
        return _fetch(path)
    local = Path(path).expanduser()
    if local.is_file():
        return [DataFile(local, path)]
    if local.is_dir():
        return _in_folder(local, path)
    if glob.has_magic(path):
        found = [Path(p) for p in sorted(glob.glob(str(local), recursive=True))]
        files = [DataFile(p, str(p)) for p in found if p.is_file()]
        if not files:
            raise DataError(f"{path}: no file matches")
        return files
    if _HUB_NAME.fullmatch(path) and local.suffix.lower() not in READERS:
        return _from_hub(path, split)
    raise DataError(f"{path}: no such file or folder")


def _in_folder(folder: Path, path: str) -> list[DataFile]:
    inside = (p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file())
    files = [
        p for p in inside if p.suffix.lower() in READERS and not any(part.startswith(".") for part in p.parts)
    ]
    if not files:
        raise DataError(f"{path}: no {', '.join(READERS)} file in this folder")
    return [DataFile(folder / p, str(Path(path) / p)) for p in files]


def _fetch(url: str) -> list[DataFile]:
    """Copy remote files here by fsspec; they are removed when the last DataFile is gone."""
    try:
        import fsspec  # type: ignore[import-untyped]  # it ships no types

        files, _, found = fsspec.get_fs_token_paths(url, expand=True)
    except ImportError as error:
        raise MissingExtraError(
            f"{url} needs another package: pip install 'kitae[remote]' ({error})"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{url}: {error}") from error
    folder = tempfile.TemporaryDirectory(prefix="kitae-remote-")
    fetched = []
    for i, remote in enumerate(found):
        path = Path(folder.name) / f"{i:05d}{Path(remote).suffix}"
        try:
            files.get_file(remote, str(path))
        except OSError as error:
            raise DataError(f"{url}: cannot read {remote}: {error}") from error
        fetched.append(DataFile(path, remote, folder))
    if not fetched:
        raise DataError(f"{url}: no file matches")
    return fetched


def _from_hub(name: str, split: str) -> list[DataFile]:
    """Download the files of one split of a hub data set, `owner/name` or `owner/name/config`; offline, use the cache."""
    from huggingface_hub import HfApi, errors, snapshot_download

    owner, repo, *rest = name.split("/", 2)
    repo_id, config = f"{owner}/{repo}", rest[0] if rest else None
    connection_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]  # of the hub's HTTP library
    try:
        info = HfApi().dataset_info(repo_id, timeout=20)
        chosen = select_split(
            [f.rfilename for f in info.siblings or []], name=name, split=split, config=config
        )
        folder = Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns=chosen))
    except (OSError, connection_error, errors.HFValidationError) as error:
        cached = None if isinstance(error, errors.HfHubHTTPError | ValueError) else _cached(repo_id)
        if cached is None:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise DataError(
                f"{name}: no such file or folder, and not to be had from the hub: {reason}"
            ) from error
        folder, names = cached
        chosen = select_split(names, name=name, split=split, config=config)
    return [DataFile(folder / file, f"{repo_id}/{file}") for file in chosen]


def _cached(repo_id: str) -> tuple[Path, list[str]] | None:
    """Folder and file names of a hub data set in the local cache, if it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, repo_type="dataset", local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder, [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file()]


def select_split(names: Sequence[str], *, name: str, split: str, config: str | None) -> list[str]:
    """Which of a hub data set's files hold a split.

    Files that name no split at all are the train split. Example: ["data/train-00000-of-00001.parquet",
    "data/test-00000-of-00001.parquet"] with split train gives the first.
    """
    files = [file for file in sorted(names) if Path(file).suffix.lower() in READERS]
    if config is not None:
        files = [file for file in files if file.startswith(f"{config}/")]
    if not files:
        raise DataError(
            f"{name}: the hub data set has no {', '.join(READERS)} files{f' in {config}' if config else ''}"
        )
    by_split = [file for file in files if _names_split(file, split)]
    any_split = any(
        _names_split(file, s) for file in files for s in ("train", "test", "validation", "valid", "dev")
    )
    if not by_split and (split != "train" or any_split):
        raise DataError(
            f"{name}: no files of the split {split!r} (data.split); there are {', '.join(files[:8])}"
        )
    chosen = by_split or files
    folders = sorted({file.partition("/")[0] for file in chosen if "/" in file})
    if config is None and len(folders) > 1:
        raise DataError(
            f"{name}: has several configurations; name one of {', '.join(f'{name}/{f}' for f in folders)}"
        )
    return chosen


def _names_split(file: str, split: str) -> bool:
    return split in re.split(r"[/._-]", file)
