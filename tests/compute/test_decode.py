"""Decoding gives the right pixels for every form of image, and one readable line for everything else."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from backboned.registry.backbone import Preprocessing
from backboned.registry.errors import BackbonedError, ErrorKind
from backboned.server.compute.decode import decode, from_pixels
from backboned.server.compute.preprocess import augment, prepare

LIMIT = 100_000_000
PHOTOS = Path(__file__).parents[3] / "shared" / "data"


def scene(width: int = 90, height: int = 70) -> Image.Image:
    """A smooth, asymmetric colour picture, so that every flip and every swapped channel shows."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    red, green, blue = 255 * x, 255 * y, 127 * (1 + np.sin(9 * x + 5 * y))
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def rows(data: bytes) -> NDArray[np.uint8]:
    """Decoded pixels as `[height, width, 3]`."""
    tensor = decode(data, max_pixels=LIMIT)
    assert tensor.dtype == torch.uint8 and tensor.shape[0] == 3
    pixels: NDArray[np.uint8] = tensor.permute(1, 2, 0).numpy()
    return pixels


def refusal(data: bytes, max_pixels: int = LIMIT) -> str:
    with pytest.raises(BackbonedError) as caught:
        decode(data, max_pixels=max_pixels)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT
    assert "\n" not in caught.value.message
    return caught.value.message


def png(width: int, height: int, bits: int, colour: int, row: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG whose rows are all `row`, with `chunks` before its pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    squeeze = zlib.compressobj(9)
    pixels = b"".join(squeeze.compress(b"\0" + row) for _ in range(height)) + squeeze.flush()
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, body) for kind, body in parts)


@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"restart_marker_blocks": 3}]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_has_the_pixels_that_pil_gives(mode: str, options: dict[str, object]) -> None:
    data = encoded(scene().convert(mode), "JPEG", quality=90, **options)
    assert np.array_equal(rows(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_a_lossless_file_gives_back_its_pixels(form: str, options: dict[str, object]) -> None:
    assert np.array_equal(rows(encoded(scene(), form, **options)), np.asarray(scene()))


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_a_compressed_tiff_gives_back_its_pixels(compression: str) -> None:
    assert np.array_equal(rows(encoded(scene(), "TIFF", compression=compression)), np.asarray(scene()))


def test_a_lossy_webp_is_close_to_its_pixels() -> None:
    difference = rows(encoded(scene(), "WEBP", quality=95)).astype(int) - np.asarray(scene())
    assert np.abs(difference).mean() < 4


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_grey_becomes_three_equal_channels(form: str) -> None:
    pixels = rows(encoded(Image.new("L", (16, 16), 77), form))
    assert (pixels == 77).all()


def test_one_bit_becomes_black_and_white() -> None:
    image = Image.new("1", (8, 2))
    image.putpixel((3, 1), 1)
    pixels = rows(encoded(image, "PNG"))
    assert pixels[1, 3].tolist() == [255, 255, 255]
    assert pixels.sum() == 3 * 255


def test_a_palette_becomes_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.putpixel((1, 0), 1)
    for form in ("PNG", "GIF", "BMP"):
        assert rows(encoded(image, form)).tolist() == [[[10, 20, 30], [200, 150, 100]]]


def test_the_first_frame_of_an_animated_gif_is_read() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    assert rows(data).tolist() == [[[255, 0, 0]] * 6] * 4


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_laid_on_white(form: str) -> None:
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    image.putpixel((1, 0), (255, 0, 0, 255))
    image.putpixel((2, 0), (0, 0, 0, 51))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert rows(encoded(image, form, **options)).tolist() == [[[255, 255, 255], [255, 0, 0], [204, 204, 204]]]


def test_grey_with_alpha_is_laid_on_white() -> None:
    image = Image.new("LA", (2, 1), (100, 255))
    image.putpixel((1, 0), (0, 0))
    assert rows(encoded(image, "PNG")).tolist() == [[[100, 100, 100], [255, 255, 255]]]


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_laid_on_white(form: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 150, 100])
    image.putpixel((1, 0), 1)
    assert rows(encoded(image, form, transparency=0)).tolist() == [[[255, 255, 255], [200, 150, 100]]]


@pytest.mark.parametrize(
    ("bits", "colour", "row", "key", "expected"),
    [
        (8, 0, bytes([7, 9]), struct.pack(">H", 7), [[255] * 3, [9] * 3]),
        (8, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">HHH", 4, 5, 6), [[1, 2, 3], [255] * 3]),
        (16, 0, struct.pack(">HH", 0x1234, 0x1235), struct.pack(">H", 0x1234), [[255] * 3, [0x12] * 3]),
    ],
)
def test_a_transparent_colour_is_laid_on_white(
    bits: int, colour: int, row: bytes, key: bytes, expected: list[list[int]]
) -> None:
    assert rows(png(2, 1, bits, colour, row, (b"tRNS", key))).tolist() == [expected]


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    values = [0, 255, 256, 0x1234, 0x8000, 0xFFFF]
    expected = [[[v >> 8] * 3 for v in values]]
    assert rows(png(6, 1, 16, 0, struct.pack(">6H", *values))).tolist() == expected
    assert rows(encoded(Image.fromarray(np.array([values], np.uint16)), "TIFF")).tolist() == expected


def test_sixteen_bit_colour_is_scaled_likewise() -> None:
    assert rows(png(2, 1, 16, 2, struct.pack(">6H", 0, 0x80FF, 0xFFFF, 0x1234, 256, 255))).tolist() == [
        [[0, 0x80, 0xFF], [0x12, 1, 0]]
    ]


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)
    assert np.abs(rows(data).astype(int) - [255, 0, 0]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_is_turned_as_its_exif_says(form: str, orientation: int) -> None:
    to_stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # "turn by 90 degrees clockwise" is stored turned the other way
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = scene().transpose(to_stored[orientation]) if orientation > 1 else scene()
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = rows(encoded(stored, form, exif=exif, **({"lossless": True} if form == "WEBP" else {"quality": 98})))
    assert pixels.shape == (70, 90, 3)
    assert np.abs(pixels.astype(int) - np.asarray(scene())).mean() < 2


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_unknown_orientation_changes_nothing(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(rows(encoded(scene(), "PNG", exif=exif)), np.asarray(scene()))


def test_broken_exif_spoils_no_picture() -> None:
    data = encoded(scene(), "JPEG", exif=b"Exif\0\0not a TIFF header")
    assert rows(data).shape == (70, 90, 3)


def test_an_mpo_is_read_as_its_first_picture() -> None:
    data = encoded(scene(), "MPO", save_all=True, append_images=[Image.new("RGB", (90, 70))], quality=98)
    assert np.abs(rows(data).astype(int) - np.asarray(scene())).mean() < 2


@pytest.mark.parametrize(
    ("data", "begins"),
    [
        (b"<!DOCTYPE html><html></html>", "<!DOCTYPE html>"),
        (b"\x80\x04\x95\x10\x00", "\\x80\\x04\\x95"),
        (b"%PDF-1.7", "%PDF-1.7"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "%!PS-Adobe"),
        (b"\0" * 50, "\\x00\\x00"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "RIFF"),
    ],
)
def test_what_is_no_image_is_told_by_how_it_begins(data: bytes, begins: str) -> None:
    message = refusal(data)
    assert begins in message and "none of JPEG, PNG, WebP, GIF, BMP, TIFF" in message


def test_no_bytes_are_told_as_empty() -> None:
    assert "empty" in refusal(b"")


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning", "ignore:Truncated File Read:UserWarning")
def test_no_cut_off_file_becomes_a_picture(form: str, options: dict[str, object]) -> None:
    data = encoded(scene(), form, **options)
    for kept in (16, 60, len(data) // 4, len(data) // 2, len(data) * 3 // 4, len(data) - 8):
        assert "not an image that can be read" in refusal(data[:kept])


def test_a_truncated_jpeg_says_how_many_bytes_there_were() -> None:
    data = encoded(scene(), "JPEG")[:1234]
    assert refusal(data) == "not an image that can be read: JPEG is truncated after 1234 bytes"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_jpeg_cut_off_and_closed_by_an_end_marker_is_refused(mode: str) -> None:
    data = encoded(scene(300, 200).convert(mode), "JPEG", quality=95)
    assert "truncated" in refusal(data[: len(data) * 2 // 3] + b"\xff\xd9")


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_a_jpeg_that_is_grey_by_nature_is_read(options: dict[str, object]) -> None:
    assert (rows(encoded(Image.new("RGB", (50, 30), (128, 128, 128)), "JPEG", **options)) == 128).all()


def test_a_jpeg_with_its_end_zeroed_is_refused() -> None:
    data = encoded(scene(300, 200), "JPEG")
    assert "truncated" in refusal(data[:-2000] + bytes(2000))


@given(position=st.integers(33, 1 << 30), bits=st.integers(1, 255))
@settings(max_examples=50, deadline=None)
def test_a_png_with_any_byte_changed_is_refused(position: int, bits: int) -> None:
    data = bytearray(encoded(scene(40, 30), "PNG"))
    data[33 + (position - 33) % (len(data) - 12 - 33)] ^= bits
    assert "PNG" in refusal(bytes(data))


def test_too_many_pixels_are_told_from_the_header_alone() -> None:
    bomb = png(20_000, 20_000, 1, 0, bytes(2_500))
    assert len(bomb) < 60_000
    assert refusal(bomb) == "an image is too large: 20000x20000 = 400 megapixels; the limit is 100"
    header_alone = bomb[:33]  # no pixel follows: the size must have been looked at first
    assert "20000x20000 = 400 megapixels" in refusal(header_alone + struct.pack(">I", 9) + b"IDAT" + bytes(9))


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_the_limit_holds_for_every_format(form: str) -> None:
    data = encoded(scene(), form)
    assert decode(data, max_pixels=6300).shape == (3, 70, 90)
    assert "90x70 = 0.0063 megapixels; the limit is 0.006299" in refusal(data, max_pixels=6299)


@pytest.mark.parametrize("width", [10_000, 20_000])  # PIL's own limit warns at 89 megapixels and raises at 179
def test_a_limit_above_that_of_pil_is_kept(width: int) -> None:
    header = png(width, 10_000, 1, 0, b"")[:33]
    assert "PNG is truncated" in refusal(header, max_pixels=200_000_000)


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(width: int, height: int) -> None:
    assert "its header gives no size" in refusal(png(width, height, 8, 0, b"\0" * width))
    jpeg = bytearray(encoded(scene(), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    assert "its header gives no size" in refusal(bytes(jpeg))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_defined_white_are_refused(mode: str) -> None:
    assert "8 or 16 bits" in refusal(encoded(Image.new(mode, (4, 4), 1), "TIFF"))


@given(
    data=st.binary(max_size=200), prefix=st.sampled_from([b"", b"\xff\xd8\xff", b"GIF89a", b"BM", b"II*\0", b"MM\0*"])
)
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes_are_a_picture_or_a_refusal(data: bytes, prefix: bytes) -> None:
    try:
        assert decode(prefix + data, max_pixels=1_000_000).ndim == 3
    except BackbonedError as error:
        assert error.kind is ErrorKind.INVALID_ARGUMENT


@given(
    form=st.sampled_from(["JPEG", "GIF", "WEBP", "BMP"]),
    changes=st.lists(st.tuples(st.integers(0), st.binary(min_size=1, max_size=4))),
)
@settings(max_examples=150, deadline=None)
def test_a_damaged_file_is_a_picture_or_a_refusal(form: str, changes: list[tuple[int, bytes]]) -> None:
    data = bytearray(encoded(scene(30, 20), form))
    for position, piece in changes:
        data[position % len(data) : position % len(data) + len(piece)] = piece
    try:
        assert decode(bytes(data), max_pixels=1_000_000).ndim == 3
    except BackbonedError as error:
        assert error.kind is ErrorKind.INVALID_ARGUMENT


def test_many_threads_get_the_same_pictures() -> None:
    files = [encoded(scene(90 + n, 70), form) for n in range(4) for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF")]
    expected = [rows(data) for data in files]
    with ThreadPoolExecutor(8) as pool:
        for index, pixels in enumerate(pool.map(rows, files * 10)):
            assert np.array_equal(pixels, expected[index % len(files)])


def test_decoding_and_preparing_start_no_threads() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(scene(1200, 900), form, exif=exif) for form in ("JPEG", "PNG")]

    def tasks() -> set[Path]:
        return set(Path("/proc/self/task").iterdir())

    def threads_started() -> tuple[set[Path], set[Path]]:
        torch.set_num_threads(4)
        before = tasks()
        for data in files:
            image = decode(data, max_pixels=LIMIT)
            prepare(image, Preprocessing())
            augment(image, Preprocessing(), 1)
        by_us = tasks() - before
        torch.ones(1_000_000).add(1)
        return by_us, tasks() - before

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as fresh:  # OpenMP keeps a team for each thread that has asked for one
            by_us, with_torch = fresh.submit(threads_started).result()
    finally:
        torch.set_num_threads(threads)
    assert not by_us
    assert with_torch, "torch opened no team, so the check above shows nothing"


@pytest.mark.shared
@pytest.mark.skipif(not PHOTOS.is_dir(), reason="no real photos beside this checkout")
def test_real_photos_have_the_pixels_that_pil_gives() -> None:
    photos = sorted(PHOTOS.glob("sample_photos/*.jpg")) + sorted(PHOTOS.glob("flower_photos/val/*/*.jpg"))[::15]
    assert photos
    for photo in photos:
        assert np.array_equal(rows(photo.read_bytes()), np.asarray(Image.open(photo).convert("RGB"))), photo.name


def test_raw_pixels_are_taken_row_by_row() -> None:
    pixels = np.asarray(scene())
    tensor = from_pixels(pixels.tobytes(), [70, 90, 3], max_pixels=LIMIT)
    assert np.array_equal(tensor.permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize(
    ("size_bytes", "shape", "expected"),
    [
        (12, [2, 2], "[height, width, 3]"),
        (12, [3, 2, 2], "[height, width, 3]"),
        (11, [2, 2, 3], "take 12 bytes (uint8), got 11"),
        (0, [0, 2, 3], "no pixels"),
        (12, [-2, -2, 3], "no pixels"),
        (0, [1 << 40, 1 << 40, 3], "the limit is 100"),
        (0, [], "[height, width, 3]"),
    ],
)
def test_raw_pixels_that_do_not_fit_are_refused(size_bytes: int, shape: list[int], expected: str) -> None:
    with pytest.raises(BackbonedError) as caught:
        from_pixels(bytes(size_bytes), shape, max_pixels=LIMIT)
    assert caught.value.kind is ErrorKind.INVALID_ARGUMENT and expected in caught.value.message
