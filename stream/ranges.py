"""Files whose bytes are read in ranges, on this machine or on the Hub; what the Hub answers is checked."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

import xxhash
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

import stream.client  # noqa: F401 (bounds the waits of every request)
from stream import allowance
from stream.blocks import Pages
from stream.explain import one_line_errors
from stream.files import read_small
from stream.retry import Network, WrongAnswer, patiently

SHA256 = 64  # digits
LARGEST_IMAGE = 2**26  # bytes of a file that is read by its path; none that can be decoded is larger
WHOLE_FILE = 2**23  # bytes: a server that knows no ranges may send a whole file of this size
SAME_BYTES = 8  # times that the same wrong bytes come before they are taken to be the file's own

T = TypeVar("T")
Check = Callable[[bytes | memoryview], object]


def trust(data: bytes | memoryview) -> None:
    """Take bytes as they are."""


class Files(Protocol):
    """Files whose bytes can be read in ranges, numbered from 0. The names of those of a dataset begin with `root`."""

    names: list[str]
    root: str
    by_request: bool  # each read costs a request

    def size(self, number: int) -> int:
        """The size of a file in bytes. Raises DataError."""

    def told_size(self, number: int) -> int | None:
        """The size of a file on the Hub, where its listing tells it."""

    def read(self, number: int, first: int, end: int, check: Check = trust) -> bytes | memoryview:
        """Bytes first to end - 1 of a file. `check` raises ValueError for wrong ones. Raises DataError."""

    def read_path(self, path: str) -> bytes | None:
        """A small file by its path below the root, None if none can be read there.

        Raises DataError, and ValueError where a link leads out of the root.
        """


class LocalFiles:
    """Files on this machine. `root` is the folder of their dataset, with a slash at its end; by default the first's."""

    by_request = False

    def __init__(self, names: list[str], root: str | None = None) -> None:
        self.names = names
        self.root = root or os.path.join(os.path.realpath(os.path.dirname(names[0])), "")

    def read(self, number: int, first: int, end: int, check: Check = trust) -> bytes:
        with one_line_errors(self.names[number]), open(self.names[number], "rb") as file:
            file.seek(first)
            data = file.read(end - first)
            check(data)
            return data

    def told_size(self, number: int) -> int | None:
        return None

    def size(self, number: int) -> int:
        with one_line_errors(self.names[number]):
            return Path(self.names[number]).stat().st_size

    def read_path(self, path: str) -> bytes | None:
        place = os.path.realpath(self.root + path)
        if not place.startswith(self.root):
            raise ValueError("it leads out of the folder")
        return read_if_there(Path(place))


def read_if_there(path: Path) -> bytes | None:
    try:
        return read_small(path, LARGEST_IMAGE)
    except OSError:
        return None


class FileInfo(NamedTuple):
    """What the Hub tells of a file: its size in bytes, and its SHA-256 or, for what is not in LFS, Git's SHA-1."""

    size: int
    digest: str


class HubFiles:
    """Files of a dataset on the Hub at one commit, read by range requests.

    The range, the size and the checksum of an answer must be those that the Hub tells, and `check` must agree. When a
    request breaks off, the bytes received are kept and the rest is requested again; a wrong answer is dropped.
    """

    by_request = True

    def __init__(
        self,
        source: str,
        commit: str,
        names: list[str],
        network: Network,
        told: Mapping[str, FileInfo] = MappingProxyType({}),
    ) -> None:
        self.names = names
        self.root = ""
        self._source = source
        self._commit = commit
        self._urls = [hf_hub_url(source, name, repo_type="dataset", revision=commit) for name in names]
        self._network = network
        self._told = {number: told[name] for number, name in enumerate(names) if name in told}
        self._heard: dict[int, int] = {}

    def told_size(self, number: int) -> int | None:
        return self._told[number].size if number in self._told else None

    def size(self, number: int) -> int:
        """What is told; where nothing is, what two answers agree on."""

        def hear() -> int:
            sizes = {self._get(number, 0, 1, Pages(1)) for _ in range(2)}
            if len(sizes) > 1:
                raise WrongAnswer(f"the server tells several sizes: {', '.join(map(str, sorted(sizes)))}")
            return sizes.pop()

        if (told := self.told_size(number)) is not None:
            return told
        if number not in self._heard:
            self._heard[number] = self._patiently(number, hear, 2**20)
        return self._heard[number]

    def read(self, number: int, first: int, end: int, check: Check = trust) -> memoryview:
        wanted = end - first
        if wanted <= 0:
            return memoryview(b"")
        held, refused = Pages(wanted), Counter[str]()

        def rest() -> memoryview:
            nonlocal held
            held = mine = Pages(wanted, held.written())  # a request that was given up may still add to its own
            if mine.tell() < wanted:
                size = self._get(number, first + mine.tell(), end, mine)
                if size != self.size(number):
                    mine.cut(0)
                    raise WrongAnswer(f"the server has a file of {size:,} bytes, not of {self.size(number):,}")
            try:
                if number in self._told and wanted == self.size(number):
                    compare_digest(self._told[number].digest, mine.written())
                check(mine.written())
            except ValueError as error:
                digest = xxhash.xxh3_128_hexdigest(mine.written())
                mine.cut(0)
                refused[digest] += 1
                text = f"bytes {first:,} to {end - 1:,} of {self.size(number):,}: {error}"
                raise (ValueError if refused[digest] == SAME_BYTES else WrongAnswer)(text) from None
            return mine.written()

        return self._patiently(number, rest, wanted + 2**20, lambda: held.tell())

    def read_path(self, path: str) -> bytes | None:
        url = hf_hub_url(self._source, path, repo_type="dataset", revision=self._commit)

        def whole() -> bytes | None:
            try:
                with _asked(url, 0, LARGEST_IMAGE + 1) as response:
                    size, digest = _size_of(response), _told_digest(response)
                    if size > LARGEST_IMAGE:
                        return None
                    if response.status_code == 200 and not digest:
                        raise WrongAnswer("a whole file came without the Hub's checksum")
                    data = Pages(max(1, size))
                    _receive(response, 0, size, data)
                    compare_digest(digest, data.written())
                    return bytes(data.written())
            except (RemoteEntryNotFoundError, Empty):
                return None
            except ValueError as error:
                raise WrongAnswer(str(error)) from None

        with one_line_errors(self._source, path, self._commit):
            turn = allowance.requests.wait_for_turn
            return patiently(whole, self._network, path, turn=turn, most=LARGEST_IMAGE + 2**20, aloud=False)

    def _patiently(self, number: int, call: Callable[[], T], most: int, progress: Callable[[], int] | None = None) -> T:
        name, turn = self.names[number], allowance.requests.wait_for_turn
        with one_line_errors(self._source, name, self._commit):
            return patiently(call, self._network, name, progress=progress, turn=turn, most=most, aloud=False)

    def _get(self, number: int, first: int, end: int, data: Pages) -> int:
        """Append bytes first to end - 1 to `data`, and return the size of the file that the server tells."""
        with _asked(self._urls[number], first, end) as response:
            size = _size_of(response)
            if response.status_code == 200 and not end <= size <= max(WHOLE_FILE, 2 * (end - first)):
                raise WrongAnswer(f"bytes {first:,} to {end - 1:,} were asked for, and the whole file came")
            _receive(response, first, end, data)
            return size


class Empty(WrongAnswer):
    """A file has no bytes."""


@contextmanager
def _asked(url: str, first: int, end: int) -> Iterator[Any]:
    """The answer to a range request, if it is none of an error. Raises Empty."""
    headers = build_hf_headers() | {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
    with get_session().stream("GET", url, headers=headers) as response:
        if response.status_code == 416 and response.headers.get("Content-Range", "").strip() == "bytes */0":
            raise Empty
        if response.status_code == 416:
            raise WrongAnswer(f"the server does not have bytes {first:,} to {end - 1:,}")
        if response.status_code >= 400:
            hf_raise_for_status(response)
        if response.status_code not in (200, 206):
            raise WrongAnswer(f"the server answers a range request with status {response.status_code}")
        yield response


def _size_of(response: Any) -> int:
    """The size of the whole file that an answer is of. Raises WrongAnswer where none is told."""
    whole = response.status_code == 200
    told = response.headers.get("Content-Length" if whole else "Content-Range", "").strip()
    match = re.fullmatch(r"(\d{1,18})" if whole else r"bytes \d+-\d+/(\d{1,18})", told)
    if match is None:
        raise WrongAnswer(f"{told or 'an unnamed range'} came")
    return int(match[1])


def _receive(response: Any, first: int, end: int, data: Pages) -> None:
    """Append bytes first to end - 1 of a file, from an answer that has just them or the whole file."""
    size, asked = _size_of(response), f"bytes {first:,} to {end - 1:,} were asked for"
    skip = first if response.status_code == 200 else 0
    told = response.headers.get("Content-Range")
    if response.status_code == 206 and told != f"bytes {first}-{end - 1}/{size}":
        raise WrongAnswer(f"{asked}, and {told} came")
    before, left = data.tell(), end - first
    for chunk in response.iter_bytes():
        part = memoryview(chunk)[skip:]
        skip = max(0, skip - len(chunk))
        data.write(part[: max(0, left)])
        left -= len(part)
        if left <= 0 and response.status_code == 200 and end < size:
            return
        if left < 0:
            data.cut(before)
            raise WrongAnswer(f"{asked}, and more came")
    if left:
        raise ConnectionError(f"{end - first - left:,} of {end - first:,} bytes arrived")


def _told_digest(response: Any) -> str:
    """The checksum that the Hub tells of a file with the answer or with the redirect to it, or nothing."""
    for answer in (*response.history, response):
        tag = str(answer.headers.get("X-Linked-ETag") or answer.headers.get("ETag", "")).removeprefix("W/").strip('"')
        if re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", tag):
            return tag
    return ""


def compare_digest(told: str, data: memoryview) -> None:
    """Raise ValueError for a whole file that is not the one of this digest, if there is one."""
    kind, before = ("sha256", b"") if len(told) == SHA256 else ("sha1", b"blob %d\0" % len(data))
    digest = hashlib.new(kind, before)  # Git hashes a file with its size before it
    digest.update(data)
    if told and digest.hexdigest() != told:
        raise ValueError("the file has another checksum on the Hub")
