"""What a dataset on the Hub has at one commit, and what opens its files."""

import json
import math
import mmap
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import datasets
import xxhash
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DataFilesNotFoundError
from huggingface_hub import HfApi, RepoFile, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, OfflineModeIsEnabled, RemoteEntryNotFoundError
from tqdm import tqdm

from errors import DataError, UsageError
from stream.cache import FileStore
from stream.data_files import READABLE, chosen_files, saved_splits, search, search_mixed, suffixes_below
from stream.explain import one_line_errors
from stream.files import read_small
from stream.ranges import FileInfo, Files, HubFiles, LocalFiles, compare_digest, read_if_there
from stream.retry import Attempt, Network, WrongAnswer, attempt, first_line, in_threads, passing_cause, patiently

T = TypeVar("T")
COMMIT = re.compile("[0-9a-f]{40}")
MIXED = "Couldn't infer the same data file format"  # what `datasets` says where splits have different files
PATHS_A_CALL = 500
DOWNLOADS = 8


@dataclass(frozen=True)
class Listing:
    """A dataset's commit (None for a local folder), the files of each split, and its features as a `datasets` dict.

    File names on the Hub are relative to the repository. `features` is None when only the files have them; `lengths`
    has the samples of each file if there is an `_info.json`, as in timm's WebDatasets; `told` has the size and digest
    of each file that the Hub knows.
    """

    commit: str | None
    splits: dict[str, list[str]]
    features: dict[str, Any] | None
    lengths: dict[str, int]
    told: dict[str, FileInfo] = field(default_factory=dict)


def resolve(
    source: str, revision: str, store: FileStore, network: Network, configuration: str | None = None
) -> Listing:
    """What `datasets` finds in a Hub repository (kept in `store`) or in a local folder.

    `configuration` is the name of one, None the dataset's default. Raises DataError, UsageError if there is none of
    that name.
    """
    if Path(source).is_dir():
        with one_line_errors(source):
            return _ask_datasets(source, None, configuration)
    commit = pin(source, revision, store, network)
    name = f"{commit}/listing"
    if configuration is not None:  # by a digest, since a user may give any text
        name += f".{xxhash.xxh3_128_hexdigest(configuration.encode(errors='surrogateescape'))}"
    kept = store.get(name, lambda: json.dumps(vars(_ask_hub(source, commit, network, configuration))).encode())
    with one_line_errors(source, f"the kept listing of {source}"):
        listing = Listing(**json.loads(bytes(kept)))
        names = [name for names in listing.splits.values() for name in names]
        if listing.commit != commit or any(".." in name.split("/") or name.startswith("/") for name in names):
            raise ValueError("it has a file outside the dataset")
        return replace(listing, told={name: FileInfo(*info) for name, info in listing.told.items()})


def sensibly(call: Callable[..., T]) -> Callable[..., T]:
    """Take an answer of the Hub's API that its client stumbles over for a wrong one."""

    @wraps(call)
    def checked(*arguments: Any) -> T:
        try:
            return call(*arguments)
        except (AttributeError, LookupError, TypeError) as error:
            raise WrongAnswer(
                f"the Hub's answer makes no sense ({type(error).__name__}: {first_line(error)})"
            ) from None

    return checked


def pin(source: str, revision: str, store: FileStore, network: Network) -> str:
    """The commit that `revision` points to now, if this user may read the dataset; a commit is returned as it is.

    With HF_HUB_OFFLINE, a branch is the commit that it was the last time. Raises DataError.
    """
    if COMMIT.fullmatch(revision):
        return revision
    name = f"refs/{revision.replace('/', '--')}"

    @sensibly
    def ask() -> str:
        api = HfApi()
        sha = api.dataset_info(source, revision=revision).sha
        try:
            api.auth_check(source, repo_type="dataset")
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403) or passing_cause(error):
                raise  # others come from mirrors that do not know this call
        if not COMMIT.fullmatch(str(sha)):
            raise WrongAnswer(f"the Hub tells no commit of {source}")
        return str(sha)

    with one_line_errors(source):
        try:
            commit = patiently(ask, network, source, at_start=True)
        except OfflineModeIsEnabled:
            kept = store.find(name)
            if kept is None:
                raise
            return bytes(kept).decode()
    store.put(name, commit.encode())
    return commit


def _ask_hub(source: str, commit: str, network: Network, configuration: str | None) -> Listing:
    with one_line_errors(source, commit=commit):
        listing = patiently(lambda: _ask_datasets(source, commit, configuration), network, source, at_start=True)
        names = [name for names in listing.splits.values() for name in names]
        return replace(
            listing, told=patiently(lambda: _ask_about(source, commit, names), network, source, at_start=True)
        )


@sensibly
def _ask_datasets(source: str, commit: str | None, configuration: str | None) -> Listing:
    if commit is None and (saved := saved_splits(Path(source))):
        return Listing(None, saved, None, {})
    base = os.path.realpath(source) if commit is None else f"hf://datasets/{source}@{commit}"
    try:
        builder = datasets.load_dataset_builder(source, configuration, revision=commit)
    except ValueError as error:
        if configuration is not None or MIXED not in str(error):
            _check_configuration(source, commit, configuration)
            raise
        features, found = None, search_mixed(base)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        features, found = None, search(base)
        if passing_cause(error):
            raise
        if not any(found.values()):
            there = suffixes_below(base)
            problem = f"the files of {source} are {there}, which cannot be read" if there else f"{source} has no data"
            raise DataError(f"{problem}; {READABLE}") from error
    else:
        features, files = builder.info.features, builder.config.data_files or {}
        found = chosen_files(base, files, configuration is None)
    prefix = "" if commit is None else f"{base}/"
    splits = {split: [path.removeprefix(prefix) for path in paths] for split, paths in found.items()}
    return Listing(commit, splits, None if features is None else features.to_dict(), _lengths(source, commit, splits))


def _check_configuration(source: str, commit: str | None, configuration: str | None) -> None:
    """Refuse a configuration that does not exist, and none where the dataset has several and no default."""
    names = datasets.get_dataset_config_names(source, revision=commit)
    choices = f"choose with --dataset_config one of {' '.join(', '.join(names).split())}"
    if configuration is not None and configuration not in names:
        raise UsageError(f"{source} has no configuration {configuration}; {choices}")
    if configuration is None and datasets.get_dataset_default_config_name(source, revision=commit) is None:
        raise DataError(f"{source} has several configurations and no default; {choices}")


@sensibly
def _ask_about(source: str, commit: str, names: list[str]) -> dict[str, FileInfo]:
    """What the Hub tells of files; of none where a mirror does not know this call."""
    told: dict[str, FileInfo] = {}
    for first in range(0, len(names), PATHS_A_CALL):
        asked = names[first : first + PATHS_A_CALL]
        try:
            found = HfApi().get_paths_info(source, asked, revision=commit, repo_type="dataset")
        except HfHubHTTPError as error:
            if error.response.status_code in (401, 403) or passing_cause(error):
                raise
            return {}
        files = (item for item in found if isinstance(item, RepoFile))
        told |= {file.path: FileInfo(file.size, file.lfs.sha256 if file.lfs else file.blob_id) for file in files}
    return told


def _lengths(source: str, commit: str | None, splits: dict[str, list[str]]) -> dict[str, int]:
    """The number of samples of each tar file that the dataset's `_info.json` lists, by file name."""
    tars = [name for names in splits.values() for name in names if name.endswith(".tar")]
    if not tars:
        return {}
    try:
        path = (
            Path(source, "_info.json")
            if commit is None
            else Path(hf_hub_download(source, "_info.json", repo_type="dataset", revision=commit))
        )
        told = json.loads(read_small(path))["splits"].values()
        lengths = {
            name: int(length)
            for split in told
            for name, length in zip(split["filenames"], split["shard_lengths"], strict=True)
        }
    except (EntryNotFoundError, FileNotFoundError, LookupError, TypeError, ValueError, RecursionError) as error:
        if passing_cause(error) and not isinstance(error, ValueError):
            raise
        return {}
    return {tar: lengths[tar.rpartition("/")[2]] for tar in tars if tar.rpartition("/")[2] in lengths}


def open_files(source: str, listing: Listing, names: list[str], streaming: bool, network: Network) -> Files:
    """The files of a listing; without `streaming`, files on the Hub are downloaded first."""
    if listing.commit is None:
        return LocalFiles(names, os.path.join(os.path.realpath(source), ""))
    if streaming:
        return HubFiles(source, listing.commit, names, network, listing.told)
    return DownloadedFiles(source, listing, names, network)


class DownloadedFiles(LocalFiles):
    """Files of a dataset on the Hub at one commit, downloaded to this machine: these at once, others when read."""

    def __init__(self, source: str, listing: Listing, names: list[str], network: Network) -> None:
        self._source, self._listing, self._network = source, listing, network
        paths = list(in_threads(self._download, names, DOWNLOADS))
        super().__init__(paths, paths[0][: -len(names[0])])

    def read_path(self, path: str) -> bytes | None:
        try:
            return read_if_there(Path(self._download(path)))
        except DataError as error:
            if isinstance(error.__cause__, RemoteEntryNotFoundError):
                return None
            raise

    def _download(self, name: str) -> str:
        """The path of a file, which is compared with what the Hub tells of it when it has just come."""
        came = [0]

        def ask() -> str:
            count = attempt.get(Attempt()).count

            class Counted(tqdm):  # type: ignore[misc]
                """A bar that counts what Xet's own client brings."""

                def update(self, added: float | None = 1) -> bool | None:
                    count(int(added or 0))
                    came[0] += int(added or 0)
                    return super().update(added)

            commit = self._listing.commit
            path = hf_hub_download(self._source, name, repo_type="dataset", revision=commit, tqdm_class=Counted)
            if came[0] and name in self._listing.told:
                _compare_file(Path(path), self._listing.told[name])
            return path

        with one_line_errors(self._source, name, self._listing.commit):
            return patiently(ask, self._network, name, progress=lambda: came[0], most=math.inf)


def _compare_file(path: Path, told: FileInfo) -> None:
    """Remove a file, and raise WrongAnswer, if it is not the one that is told of."""
    with open(path, "rb") as file, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) as data:
        try:
            compare_digest(told.digest, data)
        except ValueError as error:
            path.resolve().unlink()
            raise WrongAnswer(f"{path.name} of {told.size:,} bytes: {error}") from None
