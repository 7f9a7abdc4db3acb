"""Files whose bytes are read in ranges, on this machine or on the Hub; what the Hub answers is checked."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

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
        self._told_sizes = {number: told[name].size for number, name in enumerate(names) if name in told}
        self._sizes = dict(self._told_sizes)
        self._digests = {number: told[name].digest for number, name in enumerate(names) if name in told}

    def told_size(self, number: int) -> int | None:
        return self._told_sizes.get(number)

    def size(self, number: int) -> int:
        if number not in self._sizes:
            self._patiently(number, lambda: self._get(number, 0, 1, Pages(1)), lambda: 0)
        return self._sizes[number]

    def read(self, number: int, first: int, end: int, check: Check = trust) -> memoryview:
        wanted = end - first
        if wanted <= 0:
            return memoryview(b"")
        held, refused = Pages(wanted), Counter[str]()

        def rest() -> None:
            nonlocal held
            held = mine = Pages(wanted, held.written())  # a request that was given up may still add to its own
            if mine.tell() < wanted:
                self._get(number, first + mine.tell(), end, mine)
            try:
                self._compare_digest(number, first, mine.written())
                check(mine.written())
            except ValueError as error:
                digest = xxhash.xxh3_128_hexdigest(mine.written())
                held = Pages(wanted)
                refused[digest] += 1
                text = f"bytes {first:,} to {end - 1:,} of {self.size(number):,}: {error}"
                raise (ValueError if refused[digest] == SAME_BYTES else WrongAnswer)(text) from None

        self._patiently(number, rest, lambda: held.tell())
        return held.written()

    def read_path(self, path: str) -> bytes | None:
        url = hf_hub_url(self._source, path, repo_type="dataset", revision=self._commit)

        def whole() -> bytes | None:
            headers = build_hf_headers() | {"Range": f"bytes=0-{LARGEST_IMAGE}", "Accept-Encoding": "identity"}
            response = get_session().get(url, headers=headers)
            if response.status_code == 416:  # an empty file has no such range
                return None
            try:
                hf_raise_for_status(response)
            except RemoteEntryNotFoundError:
                return None
            told, data = response.headers.get("Content-Range"), response.content
            if len(data) > LARGEST_IMAGE:
                return None
            if response.status_code == 206 and told != f"bytes 0-{len(data) - 1}/{len(data)}":
                raise WrongAnswer(f"the whole file was asked for, and {told or 'an unnamed range'} came")
            return data

        with one_line_errors(self._source, path, self._commit):
            return patiently(whole, self._network, path, turn=allowance.requests.wait_for_turn)

    def _patiently(self, number: int, call: Callable[[], None], progress: Callable[[], int]) -> None:
        name = self.names[number]
        with one_line_errors(self._source, name, self._commit):
            turn = allowance.requests.wait_for_turn
            patiently(call, self._network, name, progress=progress, turn=turn, aloud=False)

    def _get(self, number: int, first: int, end: int, data: Pages) -> None:
        """Append bytes first to end - 1 to `data`."""
        headers = build_hf_headers() | {"Range": f"bytes={first}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", self._urls[number], headers=headers) as response:
            if response.status_code == 416:
                raise WrongAnswer(f"the server does not have bytes {first:,} to {end - 1:,}")
            if response.status_code >= 400:
                hf_raise_for_status(response)
            skip = self._check_head(number, first, end, response)
            before, left = data.tell(), end - first
            for chunk in response.iter_bytes():
                part = memoryview(chunk)[skip:]
                skip = max(0, skip - len(chunk))
                data.write(part[:left])
                left -= len(part)
                if left <= 0 and response.status_code == 200:
                    return
                if left < 0:
                    data.cut(before)
                    raise WrongAnswer(f"more than bytes {first:,} to {end - 1:,} came")
        if left:
            raise ConnectionError(f"{end - first - left:,} of {end - first:,} bytes arrived")

    def _check_head(self, number: int, first: int, end: int, response: Any) -> int:
        """Compare what an answer says it is with what was asked, and return how many of its bytes to skip."""
        asked = f"bytes {first:,} to {end - 1:,} were asked for"
        if response.status_code == 206:
            told = response.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", told.strip())
            if match is None or (int(match[1]), int(match[2])) != (first, end - 1):
                raise WrongAnswer(f"{asked}, and {told or 'an unnamed range'} came")
            skip, size = 0, int(match[3])
        elif response.status_code == 200:
            length = response.headers.get("Content-Length", "")
            known = self._sizes.get(number)
            size = int(length) if re.fullmatch(r"\d{1,18}", length) else known if known is not None else -1
            if not end <= size <= max(WHOLE_FILE, 2 * (end - first)):
                raise WrongAnswer(f"{asked}, and the whole file came")
            skip = first
        else:
            raise WrongAnswer(f"{asked}, and the server answers with status {response.status_code}")
        known = self._sizes.setdefault(number, size)
        if size != known:
            raise WrongAnswer(f"{asked} of {known:,}, and the server has a file of {size:,}")
        return skip

    def _compare_digest(self, number: int, first: int, data: memoryview) -> None:
        """Raise ValueError for a whole file that is not the one of the Hub's listing."""
        told = self._digests.get(number, "")
        if told and first == 0 and len(data) == self._sizes[number]:
            kind, before = ("sha256", b"") if len(told) == SHA256 else ("sha1", b"blob %d\0" % len(data))
            digest = hashlib.new(kind, before)  # Git hashes a file with its size before it
            digest.update(data)
            if digest.hexdigest() != told:
                raise ValueError("the file has another checksum on the Hub")
