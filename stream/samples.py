"""The members of a tar shard that make a sample: an image, and what tells its label."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stream.clutter import is_clutter
from stream.folders import IMAGES, class_name, suffix_of
from stream.labels import NUMBER

TEXTS = ("cls", "class", "label", "target")
LABELS = (*TEXTS, "json", "txt")
ROLES = ("image", "img", "input", "x", "y")  # as in a.image.jpg, where the sample's key is a
KEYS = (  # of a json, the first of these tells the label
    *(
        "cls",
        "label",
        "class",
        "class_id",
        "class_idx",
        "class_index",
        "label_id",
        "label_idx",
        "target",
        "category_id",
    ),
    *("class_name", "classname", "label_name", "class_label", "category", "category_name", "name", "synset", "wnid"),
)
OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
LARGEST_NAME = 200  # characters of a class
CHUNK, ROOM, MOST_TIMES = 2**20, 2**29, 20  # bytes; a compressed tar may grow by this room and so many times its size


@dataclass(frozen=True)
class Sample:
    """The key and the members of a sample: its image, and what may tell its label, the likeliest first."""

    key: str
    image: tarfile.TarInfo
    labels: tuple[tarfile.TarInfo, ...]
    folder: str | None = None  # that it lies in, if that is what tells its class


def uncompressed(data: bytes | memoryview) -> bytes | memoryview:
    """The bytes of a tar file that may be compressed. Raises OSError, EOFError, or ReadError if they are too many."""
    opener = next((opener for magic, opener in OPENERS.items() if bytes(data[: len(magic)]) == magic), None)
    if opener is None:
        return data
    most, whole = ROOM + MOST_TIMES * len(data), io.BytesIO()
    with opener(io.BytesIO(data)) as file:
        while chunk := file.read(CHUNK):
            whole.write(chunk)
            if whole.tell() > most:
                raise tarfile.ReadError(f"it grows to more than {most:,} bytes when it is decompressed")
    return whole.getbuffer()


def members_of(archive: tarfile.TarFile, size: int) -> list[tarfile.TarInfo]:
    """The members of a tar file of `size` bytes that may be files. Raises ReadError for one that is cut off."""
    members = []
    for member in archive:
        if member.size < 0 or member.issparse():
            raise tarfile.ReadError(f"{member.name} is no plain file")
        if member.isfile() or member.islnk() or member.issym():
            members.append(member)
    if archive.offset + tarfile.BLOCKSIZE > size:
        raise tarfile.ReadError("it has no end, so a part of it is missing; fetch or make it again")
    return members


def samples_of(members: Sequence[tarfile.TarInfo]) -> tuple[list[Sample], list[str]]:
    """The samples, in the order of their first members, and the names of the members that are part of none.

    As in webdataset, members of one name up to its first dot are one sample. Where that would give a sample several
    images of different names (keys may have dots), what is behind the key is the known suffixes at the end. Where no
    member tells the label of an image, their folders may.
    """
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    passed = []
    for member in members:
        folder, slash, base = member.name.rpartition("/")
        if is_clutter(member.name):
            passed.append(member.name)
        else:
            groups.setdefault(f"{folder}{slash}{base.partition('.')[0]}", {})[member.name] = member
    samples: list[Sample] = []
    for stem, group in groups.items():
        parts = {stem: group}
        if sum(suffix_of(name) in IMAGES for name in group) > 1:
            parts = _by_key(group)
        for key, part in parts.items():
            sample = _sample(key, part)
            if sample is None:
                passed += part
            else:
                samples.append(sample)
    if not samples:
        samples = _in_folders([member for group in groups.values() for member in group.values()])
        used = {sample.image.name for sample in samples}
        passed = [member.name for member in members if member.name not in used]
    return samples, passed


def _in_folders(members: Sequence[tarfile.TarInfo]) -> list[Sample]:
    """The images that lie in folders. Raises DataError for a folder whose name is no text."""
    images = [
        member for member in members if suffix_of(member.name) in IMAGES and "/" in member.name.removeprefix("./")
    ]
    return [
        Sample(image.name.rpartition(".")[0], image, (), class_name(image.name.rpartition("/")[0])) for image in images
    ]


def _by_key(members: dict[str, tarfile.TarInfo]) -> dict[str, dict[str, tarfile.TarInfo]]:
    """Members by their keys, of which there is only one if only one has images."""
    parts: dict[str, dict[str, tarfile.TarInfo]] = {}
    for name, member in members.items():
        parts.setdefault(_key(name), {})[name] = member
    with_images = [key for key, part in parts.items() if any(suffix_of(name) in IMAGES for name in part)]
    return parts if len(with_images) > 1 else {with_images[0]: members}


def _sample(key: str, members: dict[str, tarfile.TarInfo]) -> Sample | None:
    """The sample that these members make, None if they lack an image or what tells its label."""

    def ranked(suffixes: Sequence[str]) -> list[tarfile.TarInfo]:
        found = [
            (suffixes.index(suffix), len(name), name) for name in members if (suffix := suffix_of(name)) in suffixes
        ]
        return [members[name] for _, _, name in sorted(found)]

    images, labels = ranked(IMAGES), ranked(LABELS)
    return Sample(key, images[0], tuple(labels)) if images and labels else None


def _key(name: str) -> str:
    """A member's name without the suffixes at its end that tell what it holds."""
    folder, slash, base = name.rpartition("/")
    key, *suffixes = base.split(".")
    while suffixes and suffixes[-1].lower() in (*IMAGES, *LABELS, *ROLES):
        suffixes.pop()
    return f"{folder}{slash}{'.'.join((key, *suffixes))}"


def label_of(archive: tarfile.TarFile, sample: Sample) -> int | str | None:
    """The number or the name of a sample's class, None if nothing tells it. Raises ValueError for what is neither."""
    for member in sample.labels:
        data = content(archive, member)
        try:
            value = _told(json.loads(data)) if suffix_of(member.name) == "json" else data.decode().strip()
            label = _checked(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the member {member.name} holds no label: {error or type(error).__name__}") from error
        if label is not None:
            return label
    return sample.folder


def content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The bytes of a member, or of the one that it links to; none of what is no file."""
    file = archive.extractfile(member)
    return b"" if file is None else file.read()


def _told(value: Any) -> Any:
    """What of a json is the label: all of it, or the value of a key."""
    if not isinstance(value, dict):
        return value
    lower = {str(key).lower(): found for key, found in value.items()}
    return next((lower[key] for key in KEYS if lower.get(key) is not None), None)


def _checked(value: Any) -> int | str | None:
    """A label that may be a list of one, a number in text or, as 1.0, a whole number. Raises ValueError."""
    if isinstance(value, list) and len(value) == 1:
        return _checked(value[0])
    if isinstance(value, bool):
        return str(value)
    if (isinstance(value, str) and NUMBER.fullmatch(value)) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if isinstance(value, str) and len(value) > LARGEST_NAME:
        raise ValueError(f"{value[:40]!r}... is longer than a class's name")
    if value is None or value == "":
        return None
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    raise ValueError(f"{str(value)[:40]} is no number or name of a class")


def as_text(name: str) -> str:
    """A member's name, of which bytes that are no UTF-8 are replaced."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def described(names: Sequence[str]) -> str:
    """The suffixes of members, the most frequent first, in words."""
    counts = Counter(f".{suffix_of(name)}" if "." in name else "none" for name in names)
    return ", ".join(f"{suffix} ({count:,})" for suffix, count in counts.most_common(5))
