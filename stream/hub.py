"""Files on the Hub at one commit: their listing, and ranges of their bytes."""

import json
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import datasets
import xxhash
from huggingface_hub import HfApi, get_session, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

import distributed
from errors import DataError, UsageError
from stream.cache import FileStore
from stream.files import read_small
from stream.retry import Network, one_line_errors, patiently

T = TypeVar("T")

START_PATIENCE = 20.0  # seconds: at the start giving up loses nothing, and the user may be watching
LARGEST_IMAGE = 2**26  # bytes of a file that is read by its path; none that can be decoded is larger
COMMIT = re.compile("[0-9a-f]{40}")


class Files(Protocol):
    """Files whose bytes can be read in ranges, numbered from 0. The names of those of a dataset begin with `root`."""

    names: list[str]
    root: str

    def size(self, number: int) -> int:
        """The size of a file in bytes. Raises DataError."""

    def read(self, number: int, first: int, end: int) -> bytes | bytearray:
        """Bytes first to end - 1 of a file. Raises DataError."""

    def read_tail(self, number: int, count: int) -> bytes:
        """The last `count` bytes of a file, or the whole file if it is smaller. Raises DataError."""

    def read_path(self, path: str) -> bytes | None:
        """A small file by its path below the root, None if none can be read there.

        Raises DataError, and ValueError where a link leads out of the root.
        """


class LocalFiles:
    """Files on this machine. `root` is the folder of their dataset, with a slash at its end; by default the first's."""

    def __init__(self, names: list[str], root: str | None = None) -> None:
        self.names = names
        self.root = root or os.path.join(os.path.realpath(os.path.dirname(names[0])), "")

    def read(self, number: int, first: int, end: int) -> bytes:
        with one_line_errors(self.names[number]), open(self.names[number], "rb") as file:
            file.seek(first)
            return file.read(end - first)

    def size(self, number: int) -> int:
        with one_line_errors(self.names[number]):
            return Path(self.names[number]).stat().st_size

    def read_tail(self, number: int, count: int) -> bytes:
        size = self.size(number)
        return self.read(number, max(0, size - count), size)

    def read_path(self, path: str) -> bytes | None:
        place = os.path.realpath(self.root + path)
        if not place.startswith(self.root):
            raise ValueError("it leads out of the folder")
        return _read_if_there(Path(place))


class DownloadedFiles(LocalFiles):
    """Files of a dataset on the Hub at one commit, downloaded to this machine: these at once, others when read."""

    def __init__(self, source: str, commit: str, names: list[str], network: Network) -> None:
        self._source, self._commit, self._network = source, commit, network
        with one_line_errors(source):
            paths = [self._download(name) for name in names]
        super().__init__(paths, paths[0][: -len(names[0])])

    def read_path(self, path: str) -> bytes | None:
        with one_line_errors(self._source, path):
            try:
                return _read_if_there(Path(self._download(path)))
            except RemoteEntryNotFoundError:
                return None

    def _download(self, name: str) -> str:
        def ask() -> str:
            try:
                return hf_hub_download(self._source, name, repo_type="dataset", revision=self._commit)
            except LocalEntryNotFoundError as error:  # in place of a failure of the network
                raise error.__cause__ or error from None

        return patiently(ask, self._network.patience)


def _read_if_there(path: Path) -> bytes | None:
    try:
        return read_small(path, LARGEST_IMAGE)
    except OSError:
        return None


class HubFiles:
    """Files of a dataset on the Hub at one commit, read by range requests.

    When a request breaks off, the bytes received are kept and the rest is requested again, after a growing wait. Once
    half of the allowance in the Hub's RateLimit headers is used, the rest is spread evenly over time.
    """

    def __init__(self, source: str, commit: str, names: list[str], network: Network) -> None:
        self.names = names
        self.root = ""
        self._source, self._commit = source, commit
        self._urls = [hf_hub_url(source, name, repo_type="dataset", revision=commit) for name in names]
        self._network = network
        self._lock = threading.Lock()
        self._next_request = self._interval = 0.0

    def size(self, number: int) -> int:
        return self._patiently(number, lambda: self._get(number, "bytes=0-0", bytearray()), lambda: 0)

    def read(self, number: int, first: int, end: int) -> bytearray:
        data = bytearray()

        def rest() -> None:
            self._get(number, f"bytes={first + len(data)}-{end - 1}", data)
            if len(data) != end - first:
                raise ConnectionError(f"{len(data)} of {end - first} bytes arrived")

        self._patiently(number, rest, lambda: len(data))
        return data

    def read_tail(self, number: int, count: int) -> bytes:
        def tail() -> bytes:
            data = bytearray()
            size = self._get(number, f"bytes=-{count}", data)
            if len(data) != min(count, size):
                raise ConnectionError(f"{len(data)} of {min(count, size)} bytes arrived")
            return bytes(data)

        return self._patiently(number, tail, lambda: 0)

    def read_path(self, path: str) -> bytes | None:
        url = hf_hub_url(self._source, path, repo_type="dataset", revision=self._commit)

        def whole() -> bytes | None:
            self._wait_for_turn()
            headers = build_hf_headers() | {"Range": f"bytes=0-{LARGEST_IMAGE}", "Accept-Encoding": "identity"}
            response = get_session().get(url, headers=headers, timeout=self._network.stall_timeout)
            for answer in (*response.history, response):
                self._note_allowance(answer.headers)
            if response.status_code == 416:  # an empty file has no such range
                return None
            try:
                hf_raise_for_status(response)
            except RemoteEntryNotFoundError:
                return None
            return response.content if len(response.content) <= LARGEST_IMAGE else None

        with one_line_errors(self._source, path):
            return patiently(whole, self._network.patience)

    def _patiently(self, number: int, call: Callable[[], T], progress: Callable[[], int]) -> T:
        with one_line_errors(self._source, self.names[number]):
            return patiently(call, self._network.patience, progress)

    def _get(self, number: int, span: str, data: bytearray) -> int:
        """Append the received bytes of a range to `data`, and return the size of the whole file."""
        self._wait_for_turn()
        headers = build_hf_headers() | {"Range": span, "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", self._urls[number], headers=headers, timeout=self._network.stall_timeout
        ) as response:
            for answer in (*response.history, response):  # the Hub redirects to where the bytes are
                self._note_allowance(answer.headers)
            if response.status_code >= 400:
                response.read()
                hf_raise_for_status(response)
            if response.status_code != 206:
                raise OSError(f"the server answers a range request with status {response.status_code}")
            for chunk in response.iter_bytes():
                data += chunk
            return int(response.headers["Content-Range"].rpartition("/")[2])

    def _note_allowance(self, headers: Any) -> None:
        info = parse_ratelimit_headers(headers)
        if info is None or info.limit is None:
            return
        ranks = distributed.world_size()
        share = info.reset_in_seconds / max(1, info.remaining) * ranks
        self._interval = share if info.remaining < info.limit / 2 else 0.0

    def _wait_for_turn(self) -> None:
        with self._lock:
            turn = max(time.monotonic(), self._next_request)
            self._next_request = turn + self._interval
        time.sleep(max(0.0, turn - time.monotonic()))


@dataclass(frozen=True)
class Listing:
    """A dataset's commit (None for a local folder), the files of each split, and its features as a `datasets` dict.

    File names on the Hub are relative to the repository. `features` is None when only the files have them; `lengths`
    has the samples of each file if there is an `_info.json`, as in timm's WebDatasets.
    """

    commit: str | None
    splits: dict[str, list[str]]
    features: dict[str, Any] | None
    lengths: dict[str, int]


def resolve(source: str, revision: str, store: FileStore, configuration: str | None = None) -> Listing:
    """What `datasets` finds in a Hub repository (kept in `store`) or in a local folder.

    `configuration` is the name of one, None the dataset's default. Raises DataError, UsageError if there is none of
    that name.
    """
    if Path(source).is_dir():
        with one_line_errors(source):
            return _ask_datasets(source, None, configuration)
    commit = pin(source, revision, store)
    name = f"{commit}/listing"
    if configuration is not None:  # by a digest, since a user may give any text
        name += f".{xxhash.xxh3_128_hexdigest(configuration.encode(errors='surrogateescape'))}"
    kept = store.get(name, lambda: json.dumps(vars(_ask_hub(source, commit, configuration))).encode())
    with one_line_errors(source, f"the kept listing of {source}"):
        listing = Listing(**json.loads(bytes(kept)))
        names = [name for names in listing.splits.values() for name in names]
        if listing.commit != commit or any(".." in name.split("/") or name.startswith("/") for name in names):
            raise ValueError("it has a file outside the dataset")
        return listing


def pin(source: str, revision: str, store: FileStore) -> str:
    """The commit that `revision` points to now, if this user may read the dataset; a commit is returned as it is.

    With HF_HUB_OFFLINE, a branch is the commit that it was the last time. Raises DataError.
    """
    if COMMIT.fullmatch(revision):
        return revision
    name = f"refs/{revision.replace('/', '--')}"

    def ask() -> str:
        api = HfApi()
        sha = api.dataset_info(source, revision=revision).sha
        api.auth_check(source, repo_type="dataset")
        assert sha is not None
        return sha

    with one_line_errors(source):
        try:
            commit = patiently(ask, START_PATIENCE)
        except OfflineModeIsEnabled:
            kept = store.find(name)
            if kept is None:
                raise
            return bytes(kept).decode()
    store.put(name, commit.encode())
    return commit


def _ask_hub(source: str, commit: str, configuration: str | None) -> Listing:
    with one_line_errors(source):
        return patiently(lambda: _ask_datasets(source, commit, configuration), START_PATIENCE)


def _ask_datasets(source: str, commit: str | None, configuration: str | None) -> Listing:
    try:
        builder = datasets.load_dataset_builder(source, configuration, revision=commit)
    except ValueError:
        _check_configuration(source, commit, configuration)
        raise
    prefix = f"hf://datasets/{source}@{commit}/"
    files = builder.config.data_files or {}
    splits = {str(split): [str(path).removeprefix(prefix) for path in paths] for split, paths in files.items()}
    features = builder.info.features
    return Listing(commit, splits, None if features is None else features.to_dict(), _lengths(source, commit, splits))


def _check_configuration(source: str, commit: str | None, configuration: str | None) -> None:
    """Refuse a configuration that does not exist, and none where the dataset has several and no default."""
    names = datasets.get_dataset_config_names(source, revision=commit)
    choices = f"choose with --dataset_config one of {' '.join(', '.join(names).split())}"
    if configuration is not None and configuration not in names:
        raise UsageError(f"{source} has no configuration {configuration}; {choices}")
    if configuration is None and datasets.get_dataset_default_config_name(source, revision=commit) is None:
        raise DataError(f"{source} has several configurations and no default; {choices}")


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
    except (EntryNotFoundError, FileNotFoundError, LookupError, TypeError, ValueError, RecursionError):
        return {}
    return {tar: lengths[tar.rpartition("/")[2]] for tar in tars if tar.rpartition("/")[2] in lengths}


def open_files(source: str, commit: str | None, names: list[str], streaming: bool, network: Network) -> Files:
    """The files of a listing; without `streaming`, files on the Hub are downloaded first."""
    if commit is None:
        return LocalFiles(names, os.path.join(os.path.realpath(source), ""))
    return (HubFiles if streaming else DownloadedFiles)(source, commit, names, network)
