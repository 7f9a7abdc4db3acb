"""A region of a JPEG has the very pixels of the whole, and what is not sound is refused whichever way it is read."""

import ctypes.util
import io
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from PIL import Image
from shards import draw, photographs

from config import resolve
from preprocess import eval_transform, train_transform
from stream import jpeg
from stream.images import UnreadableImage, decode, decode_into
from stream.pictures import Picture
from stream.planes import split

needs_library = pytest.mark.skipif(not jpeg.can_decode_regions(), reason="there is no libjpeg-turbo 3 here")
SUBSAMPLING = {
    "4:4:4": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    "4:2:2": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_422,
    "4:2:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    "4:4:0": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440,
    "4:1:1": cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411,
}
OPTIONS = {
    "baseline": [],
    "progressive": [cv2.IMWRITE_JPEG_PROGRESSIVE, 1],
    "restarts": [cv2.IMWRITE_JPEG_RST_INTERVAL, 3],
}
SIZES = [(375, 500), (97, 61), (33, 17), (7, 250)]


def encode(image: np.ndarray, *options: int) -> bytes:
    return bytes(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90, *options])[1])


def part_of_a_photograph(height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(photographs()[1][40 : 40 + height, 60 : 60 + width])


def regions(height: int, width: int, count: int = 25) -> list[tuple[int, int, int, int]]:
    """Random ones, those of a pixel in the corners, and the whole: left, top, right, bottom."""
    rng = np.random.default_rng(0)
    found = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, width, height), (width - 1, 0, width, 1)]
    for _ in range(count):
        left, right = sorted(rng.choice(width + 1, 2, replace=False))
        top, bottom = sorted(rng.choice(height + 1, 2, replace=False))
        found.append((int(left), int(top), int(right), int(bottom)))
    return found


def assert_regions_are_the_wholes(data: bytes) -> None:
    whole = decode(data)
    for left, top, right, bottom in regions(*whole.shape[:2]):
        found = jpeg.decode_region(data, left, top, right, bottom)
        assert found is not None
        assert np.array_equal(found, whole[top:bottom, left:right]), (left, top, right, bottom)


@needs_library
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("sampling", SUBSAMPLING.values(), ids=SUBSAMPLING)
@pytest.mark.parametrize(("height", "width"), [*SIZES, (1, 1)])
def test_planes_are_those_of_the_pixels(options: list[int], sampling: int, height: int, width: int) -> None:
    smooth = cv2.GaussianBlur(part_of_a_photograph(height, width), (0, 0), 4)
    data = encode(smooth, *options, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling)
    found, pixels = jpeg.decode_planes(data), decode(data)
    assert found is not None
    for plane, expected in zip(found, split(pixels), strict=True):
        resized = cv2.resize(plane, expected.shape[::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(resized.astype(int) - expected).mean() < 1
    assert all(map(np.array_equal, Picture(data).planes(), found))
    assert found[0].shape == pixels.shape[:2]


@needs_library
def test_of_what_holds_no_such_planes_they_are_made_of_the_pixels() -> None:
    photo = part_of_a_photograph(60, 90)
    turned = Image.Exif()
    turned[274] = 6
    kinds: dict[str, dict[str, object]] = {"L": {}, "CMYK": {}, "RGB": {"keep_rgb": True}, "YCbCr": {"exif": turned}}
    for mode, options in kinds.items():
        sink = io.BytesIO()
        Image.fromarray(photo[..., ::-1]).convert(mode).save(sink, "JPEG", **options)
        found = Picture(sink.getvalue()).planes()
        for plane, expected in zip(found, split(decode(sink.getvalue())), strict=True):
            assert np.array_equal(plane, expected), mode


@needs_library
def test_damage_has_no_planes() -> None:
    data = encode(part_of_a_photograph(60, 90))
    for damaged in (data[: len(data) // 2], data[: len(data) // 2] + jpeg.END_OF_IMAGE):
        assert jpeg.decode_planes(damaged) is None
        with pytest.raises(UnreadableImage):
            Picture(damaged).planes()


@needs_library
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sampling", SUBSAMPLING)
def test_a_region_has_the_pixels_of_the_whole(sampling: str, options: str, size: tuple[int, int]) -> None:
    chosen = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SUBSAMPLING[sampling], *OPTIONS[options]]
    assert_regions_are_the_wholes(encode(part_of_a_photograph(*size), *chosen))


@needs_library
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_region_of_a_grey_image_too(size: tuple[int, int], progressive: bool) -> None:
    file = io.BytesIO()
    Image.fromarray(part_of_a_photograph(*size)).convert("L").save(file, "JPEG", progressive=progressive)
    assert_regions_are_the_wholes(file.getvalue())


@needs_library
def test_a_region_of_an_rgb_jpeg_too() -> None:
    file = io.BytesIO()
    Image.fromarray(part_of_a_photograph(97, 61)).save(file, "JPEG", keep_rgb=True)
    assert_regions_are_the_wholes(file.getvalue())


def test_no_library_changes_nothing_but_the_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, data = train_transform(resolve({"dataset": "imagenet1k"})), encode(part_of_a_photograph(375, 500))
    expected = [transform(data, (0, 0, number)) for number in range(20)]
    monkeypatch.setattr(jpeg, "_library", lambda: None)
    assert all(np.array_equal(transform(data, (0, 0, number)), one) for number, one in enumerate(expected))


@pytest.mark.parametrize("wheel", ["missing", "another"])
def test_a_library_that_is_missing_or_another_is_not_used(wheel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"missing": "/nowhere/libturbojpeg.so", "another": ctypes.util.find_library("c")}[wheel]
    monkeypatch.setattr(jpeg, "_candidates", lambda: [(found, "tj3Init")])
    assert jpeg._library.__wrapped__() is None


@needs_library
def test_a_newer_library_of_the_system_comes_first_and_an_older_one_last(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = str(jpeg.library_path())
    monkeypatch.setattr(jpeg, "SYSTEMS", (ours,))
    monkeypatch.setattr(jpeg, "find_library", lambda name: "/the/system's")
    found = [*jpeg._candidates()]
    assert (found[0], found[-1]) == ((ours, jpeg.SINCE_3_1), ("/the/system's", "tj3Init"))
    old = ctypes.util.find_library("c")
    monkeypatch.setattr(jpeg, "_candidates", lambda: [(old, jpeg.SINCE_3_1), (ours, "no_such"), (ours, "tj3Init")])
    assert str(getattr(jpeg._library.__wrapped__(), "_name", None)) == ours


def frame(marker: int, bits: int = 8) -> bytes:
    """The first bytes of a JPEG with an application segment, padding and the header of a frame."""
    segment = bytes([0xFF, 0xE0, 0, 4, 0xC3, 0xFF])
    return b"\xff\xd8" + segment + b"\xff\xff" + bytes([marker, 0, 11, bits]) + b"\0\x08\0\x08\x01\1\x11\0"


@pytest.mark.parametrize(
    ("encoded", "usual"),
    [
        *((frame(marker), marker in (0xC0, 0xC1, 0xC2)) for marker in sorted(jpeg.FRAMES)),
        (frame(0xC1, 12), False),
        (frame(0xC0)[:-10], False),
        (b"\xff\xd8\xff\xda", False),
        (b"\xff\xd8" + b"\xff\xe0\0\0" * 50, False),
        (b"", False),
    ],
)
def test_lossless_arithmetic_and_wide_frames_are_left_to_others(encoded: bytes, usual: bool) -> None:
    for data in (encoded, memoryview(encoded), np.frombuffer(encoded, np.uint8)):
        assert jpeg.is_usual(data) == usual
    assert jpeg.decode_region(encoded + jpeg.END_OF_IMAGE, 0, 0, 4, 4) is None or usual


@needs_library
def test_a_crop_of_a_jpeg_needs_no_decoding_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    transform, data = train_transform(resolve({"dataset": "imagenet1k"})), encode(part_of_a_photograph(375, 500))
    monkeypatch.delattr(cv2, "imdecode")
    assert transform(data, (0, 0, 0)).shape == (224, 224, 3)


@needs_library
@pytest.mark.parametrize("damage", ["cut short", "no end", "bad data"])
def test_what_is_not_sound_has_no_regions(damage: str) -> None:
    data = encode(part_of_a_photograph(375, 500))
    middle = len(data) // 2
    damaged = {
        "cut short": data[:middle],
        "no end": data + b"\0",
        "bad data": data[: middle - 200] + b"\xff\xd8\xff\xc0" * 50 + data[middle:],
    }[damage]
    assert jpeg.decode_region(damaged, 100, 100, 400, 370) is None
    assert jpeg.decode_region(data, 100, 100, 400, 370) is not None


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_an_image_that_exif_turns_is_cropped_after_it_is_turned(orientation: int) -> None:
    image, exif, file = Image.fromarray(part_of_a_photograph(60, 90)), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(file, "JPEG", exif=exif)
    picture = Picture(file.getvalue())
    assert picture.shape == ((90, 60, 3) if orientation == 6 else (60, 90, 3))
    assert np.array_equal(picture.region(10, 20, 50, 55), decode(file.getvalue())[20:55, 10:50])


def test_threads_do_not_disturb_each_other() -> None:
    transform = train_transform(resolve({"dataset": "imagenet1k", "image_size": 64}))
    jobs = [(encode(part_of_a_photograph(*size)), (0, 0, number)) for number in range(30) for size in SIZES]
    expected = [transform(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda job: transform(*job), jobs))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- damage ----------------------------------------------------------------------------------------------------------

SOUND = encode(part_of_a_photograph(375, 500))
PROGRESSIVE = encode(part_of_a_photograph(375, 500), *OPTIONS["progressive"])
RESTARTS = encode(part_of_a_photograph(375, 500), *OPTIONS["restarts"])
ADOBE = b"\xff\xee\0\x0eAdobe\0d\0\0\0\0"


def segments(data: bytes) -> list[int]:
    """Where the segments of the header begin, the scan's included."""
    starts, at = [], 2
    while data[at + 1] != 0xDA:
        starts.append(at)
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return [*starts, at]


def put(data: bytes, at: int, more: bytes) -> bytes:
    return data[:at] + more + data[at:]


HARMLESS = {
    "a byte in the header": put(SOUND, segments(SOUND)[1], b"\0"),
    "bytes in the header": put(SOUND, segments(SOUND)[2], b"any bytes"),
    "bytes in several places": put(put(SOUND, segments(SOUND)[-1], b"these"), segments(SOUND)[1], b"those"),
    "a new JFIF revision": SOUND.replace(b"JFIF\0\1", b"JFIF\0\7"),
    "an Adobe transform of 7": put(SOUND, 2, ADOBE + b"\7"),
    "a zero before the end": put(SOUND, -2, bytes(9)),
    "padding before the end": put(SOUND, -2, 400 * b" "),
    "padding between the scans": PROGRESSIVE.replace(b"\xff\xc4", bytes(64) + b"\xff\xc4"),
    "padding between restarts": RESTARTS.replace(b"\xff\xd3", bytes(64) + b"\xff\xd3", 5),
    "bytes after the end": SOUND + b"and so on",
    "another picture after the end": SOUND + SOUND,
    "all at once": put(put(SOUND, -2, 70 * b"U"), segments(SOUND)[1], b"?").replace(b"JFIF\0\1", b"JFIF\0\0") + b"!",
}


@pytest.mark.parametrize("oddity", HARMLESS)
def test_an_oddity_that_leaves_the_pixels_right_is_read(oddity: str) -> None:
    data = HARMLESS[oddity]
    expected = decode(
        {"padding between the scans": PROGRESSIVE, "padding between restarts": RESTARTS}.get(oddity, SOUND)
    )
    assert np.array_equal(decode(data), expected)
    assert np.array_equal(Picture(data).region(100, 100, 400, 370), expected[100:370, 100:400])
    assert np.array_equal(Picture(data).region(0, 0, 500, 375), expected)


def zeroed(data: bytes, share: float = 0.3, count: int = 40) -> bytes:
    at = int(len(data) * share)
    return data[:at] + bytes(count) + data[at + count :]


DAMAGED = {
    "bad codes": zeroed(SOUND),
    "bad codes after an oddity": put(zeroed(SOUND), segments(SOUND)[1], b"any bytes"),
    "bad codes and a new JFIF revision": zeroed(SOUND).replace(b"JFIF\0\1", b"JFIF\0\7"),
    "bad codes in one scan": zeroed(PROGRESSIVE),
    "bad codes in one interval": zeroed(RESTARTS),
    "no end": SOUND[:-2],
    "half of it": SOUND[: len(SOUND) // 2],
    "half of it, with an end": SOUND[: len(SOUND) // 2] + b"\xff\xd9",
    "data left over": put(SOUND, -2, SOUND[-50:-2]),
    "a piece of it missing": SOUND[: len(SOUND) // 3] + SOUND[len(SOUND) // 2 :],
    "an interval missing": RESTARTS.replace(b"\xff\xd3", b"\xff\xd5", 1),
}


@needs_library
@pytest.mark.parametrize("damage", DAMAGED)
def test_damage_is_told_by_the_whole_and_by_a_region(damage: str) -> None:
    for read in (decode, lambda data: Picture(data).region(0, 0, 500, 375)):
        with pytest.raises(UnreadableImage, match=r"JPEG|truncated"):
            read(DAMAGED[damage])


@needs_library
def test_damage_is_counted_in_training_and_in_evaluation() -> None:
    config, row = resolve({"dataset": "imagenet1k"}), np.zeros((224, 224, 3), np.uint8)
    fixed = resolve({"dataset": "imagenet1k", "crop": "fixed"})
    for transform in (eval_transform(config), train_transform(fixed)):
        assert decode_into(row, DAMAGED["data left over"], transform, (0, 0, 0))
    told = [decode_into(row, DAMAGED["bad codes in one scan"], train_transform(config), (0, 0, n)) for n in range(20)]
    assert all(told)


@needs_library
def test_a_cmyk_picture_is_looked_at_as_well() -> None:
    file = io.BytesIO()
    Image.fromarray(part_of_a_photograph(375, 500)).convert("CMYK").save(file, "JPEG")
    data = file.getvalue()
    assert decode(data).shape == (375, 500, 3)
    with pytest.raises(UnreadableImage, match="Corrupt JPEG data"):
        decode(zeroed(data))


def flipped_or_cut(number: int) -> bytes:
    """A photograph with some bytes changed, or a part of it alone."""
    rng = np.random.default_rng(number)
    options = list(OPTIONS.values())[number % 3]
    data = encode(draw(number, 10, (150, 300), rng), *options)
    if number % 4 == 0:
        return data[: rng.integers(1, len(data))]
    broken = bytearray(data)
    for _ in range(rng.integers(1, 10)):
        broken[rng.integers(len(broken))] = rng.integers(256)
    return bytes(broken)


def as_it_comes(data: bytes) -> tuple[np.ndarray | None, bool]:
    """What libjpeg-turbo makes of a JPEG, sound or not, and whether it has anything to say about it."""
    library, handle = jpeg._library(), jpeg._own.handle
    assert library is not None
    source = np.frombuffer(data, np.uint8)
    size = jpeg.size(data)
    if size is None or max(size) > 1000:
        return None, True
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    library.tj3SetCroppingRegion(handle, jpeg._Region(0, 0, 0, 0))
    objects = library.tj3Decompress8(handle, source.ctypes.data, len(data), pixels.ctypes.data, 3 * size[0], jpeg.RGB)
    return pixels, bool(objects)


@needs_library
def test_of_300_broken_photographs_none_is_read_to_which_the_decoder_objects() -> None:
    """Nor is any crop of one, nor does one end the run."""
    config, row = resolve({"dataset": "imagenet1k", "image_size": 64}), np.zeros((64, 64, 3), np.uint8)
    crop, evaluated = train_transform(config), eval_transform(config)
    refused = 0
    for number in range(300):
        broken = flipped_or_cut(number)
        pixels, objects = as_it_comes(broken)
        assert bool(decode_into(row, broken, evaluated, (0, 0, number))) == objects
        assert [bool(decode_into(row, broken, crop, (0, epoch, number))) for epoch in range(10)] == [objects] * 10
        refused += objects
        if not objects:
            assert pixels is not None
            height, width = pixels.shape[:2]
            region = Picture(broken).region(10, 20, width - 10, height - 30)
            assert np.array_equal(region, pixels[20 : height - 30, 10 : width - 10])
    assert 200 < refused < 290


@pytest.mark.parametrize("options", OPTIONS)
def test_what_is_known_to_be_sound_is_cropped_to_the_same_pixels(options: str) -> None:
    transform = train_transform(resolve({"dataset": "imagenet1k"}))
    data = encode(part_of_a_photograph(375, 500), *OPTIONS[options])
    for epoch in range(20):
        assert np.array_equal(transform(data, (0, epoch, 0), sound=True), transform(data, (0, epoch, 0)))


@needs_library
def test_of_what_is_known_to_be_sound_only_the_data_down_to_the_crop_are_looked_at() -> None:
    data = DAMAGED["data left over"]
    assert Picture(data).region(0, 0, 500, 100, sound=True).shape == (100, 500, 3)
    with pytest.raises(UnreadableImage):
        Picture(data).region(0, 0, 500, 100)
