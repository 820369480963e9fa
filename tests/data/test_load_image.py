import io
import os
import pickle
import struct
import subprocess
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from captum_robust.data import DataError, Sample, load_image
from captum_robust.data.image_lists import list_images
from captum_robust.data.images import _decoded, load_mask, pixels_of


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_rgb_bytes_become_unit_floats_channels_first():
    pixels = np.array([[[255, 0, 51], [0, 255, 102]]], dtype=np.uint8)
    loaded = load_image(encoded(Image.fromarray(pixels)))
    assert loaded.dtype == torch.float32
    assert loaded.shape == (3, 1, 2)
    torch.testing.assert_close(loaded[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "HSV"])
def test_every_mode_gives_three_channels_in_unit_range(mode):
    grey = Image.fromarray(np.full((5, 4), 255, dtype=np.uint8))
    image = grey.convert("RGB").convert(mode) if mode != "LA" else grey.convert("LA")
    format = {"CMYK": "TIFF", "YCbCr": "JPEG", "HSV": "TIFF"}.get(mode, "PNG")
    loaded = load_image(encoded(image.convert("RGB") if mode == "HSV" else image, format))
    assert loaded.shape == (3, 5, 4)
    torch.testing.assert_close(loaded, torch.ones(3, 5, 4), atol=0.01, rtol=0)


def test_a_cmyk_jpeg_is_not_inverted():
    red = encoded(Image.new("RGB", (8, 8), (255, 0, 0)).convert("CMYK"), "JPEG")
    torch.testing.assert_close(
        load_image(red)[:, 4, 4], torch.tensor([1.0, 0.0, 0.0]), atol=0.02, rtol=0
    )


@pytest.mark.parametrize(("value", "unit"), [(0, 0.0), (65535, 1.0), (13107, 0.2)])
def test_sixteen_bit_grey_is_scaled_by_its_range(value, unit):
    image = Image.fromarray(np.full((3, 3), value, dtype=np.uint16))
    torch.testing.assert_close(load_image(encoded(image)), torch.full((3, 3, 3), unit))


@pytest.mark.parametrize("other", [0, 65535, 65536, 2**31 - 1])
def test_32_bit_grey_is_scaled_by_its_range_whatever_else_is_in_the_image(other):
    image = Image.fromarray(np.array([[30000, other]], dtype=np.int32))
    loaded = load_image(encoded(image, "TIFF"))
    expected = torch.tensor([30000 / (2**31 - 1), other / (2**31 - 1)])
    torch.testing.assert_close(loaded[0, 0], expected, atol=0, rtol=1e-6)


def tiff(values, bits, sample_format):
    """The bytes of an uncompressed TIFF of one row, written by hand."""
    data = np.asarray(values).tobytes()
    width = len(data) * 8 // bits
    entries = [(256, width), (257, 1), (258, bits), (259, 1), (262, 1), (273, 8)]
    entries += [(277, 1), (278, 1), (279, len(data)), (339, sample_format)]
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    start = struct.pack("<2sHI", b"II", 42, 8 + len(data))
    return start + data + struct.pack("<H", len(entries)) + fields + bytes(4)


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "units"),
    [
        (np.array([0, 2**31, 2**32 - 1], np.uint32), 32, 1, [0, 0.5, 1]),
        (np.array([0, 16384, 32767], np.int16), 16, 2, [0, 0.5, 1]),
        (np.array([0, 32768, 65535], np.uint16), 16, 1, [0, 0.5, 1]),
        (np.array([0x80, 0x0F, 0xFF], np.uint8), 12, 1, [0.5, 1]),  # 0x800 and 0xfff
    ],
)
def test_grey_of_a_tiff_is_scaled_by_the_type_that_it_states(values, bits, sample_format, units):
    loaded = load_image(tiff(values, bits, sample_format))
    torch.testing.assert_close(loaded[0, 0], torch.tensor(units).float(), atol=2e-4, rtol=0)


def test_integers_without_a_file_are_16_bit_grey_and_no_more():
    dark = Image.fromarray(np.array([[30000, 65535]], dtype=np.int32))
    torch.testing.assert_close(pixels_of(dark)[0, 0], torch.tensor([30000 / 65535, 1]))
    with pytest.raises(DataError, match="expected 16-bit ones from 0 to 65535, got 0 to 65536"):
        pixels_of(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)))


def test_float_pixels_must_be_in_unit_range():
    half = Image.fromarray(np.full((2, 2), 0.5, dtype=np.float32))
    torch.testing.assert_close(load_image(encoded(half, "TIFF")), torch.full((3, 2, 2), 0.5))
    wild = Image.fromarray(np.full((2, 2), 300.0, dtype=np.float32))
    with pytest.raises(DataError, match=r"^wild\.tif: pixels: expected .*\[0, 1\]"):
        load_image(encoded(wild, "TIFF"), name="wild.tif")


def test_transparent_pixels_are_laid_over_white():
    clear_black = encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 0)))
    assert load_image(clear_black).flatten().tolist() == [1, 1, 1]
    half_black = load_image(encoded(Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert half_black[0, 0, 0] == pytest.approx(127 / 255, abs=0.01)
    palette = Image.new("P", (1, 1), 0)
    assert load_image(encoded(palette, transparency=0)).flatten().tolist() == [1, 1, 1]


def test_one_pixel_is_an_image(tmp_path):
    path = tmp_path / "dot.png"
    Image.new("RGB", (1, 1), "red").save(path)
    assert load_image(path).flatten().tolist() == [1, 0, 0]


def damaged() -> dict[str, bytes]:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    jpeg = encoded(Image.fromarray(noise), "JPEG")
    png = encoded(Image.fromarray(noise))
    return {
        "empty": b"",
        "text": b"this is not an image",
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "truncated.png": png[: len(png) // 2],
        "header only.jpg": jpeg[:20],
        "flipped.png": png[:40] + bytes(8) + png[48:],
    }


@pytest.mark.parametrize("name", damaged())
def test_a_damaged_file_is_a_one_line_data_error_that_names_it(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(damaged()[name])
    with pytest.raises(DataError) as caught:
        load_image(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_image, load_mask])
def test_a_png_with_any_byte_of_its_pixels_flipped_is_a_data_error(load):
    ramp = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    data = bytearray(encoded(Image.fromarray(ramp)))
    start = data.index(b"IDAT") + 4
    length = int.from_bytes(data[start - 8 : start - 4], "big")
    for position in range(start, start + length):
        data[position] ^= 4
        with pytest.raises(DataError, match=r"^flipped\.png: damaged"):
            load(bytes(data), name="flipped.png")
        data[position] ^= 4
    assert load_image(bytes(data)).mul(255).byte().equal(torch.from_numpy(ramp).permute(2, 0, 1))


@pytest.mark.parametrize("load", [load_image, load_mask])
@pytest.mark.parametrize("tag", ["width", "height"])
def test_a_tiff_whose_strips_leave_pixels_out_is_a_data_error(load, tag):
    file = io.BytesIO()
    Image.fromarray(np.full((12, 16, 3), 9, np.uint8)).save(file, "TIFF")
    data = bytearray(file.getvalue())
    at = data.index(struct.pack("<HHI", *((256, 4, 1) if tag == "width" else (257, 4, 1))))
    data[at + 8 : at + 12] = struct.pack("<I", 70_000)
    with pytest.raises(DataError, match=r"^cut\.tif: (its pixels are damaged|.*trunc)"):
        load(bytes(data), name="cut.tif")
    if tag == "height":
        with pytest.raises(DataError, match="it holds 192 of 1120000"):
            pixels_of(Image.open(io.BytesIO(bytes(data))))


def test_a_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_image(tmp_path / "gone.png")


def test_a_decompression_bomb_is_a_data_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for side in (11, 20):  # Pillow warns of the first and refuses the second
        with pytest.raises(DataError, match=r"bomb\.png.*decompression bomb"):
            load_image(encoded(Image.new("RGB", (side, side))), name="bomb.png")


def test_an_image_of_too_many_megapixels_is_refused_before_it_is_decoded(monkeypatch):
    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)  # 81 megapixels, of which none
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in chunks
    )
    for load in load_image, load_mask:
        with pytest.raises(DataError, match=r"^bomb\.png: expected at most 64 megapixels, got 81,"):
            load(data, name="bomb.png")
    monkeypatch.setenv("CAPTUM_ROBUST_MAX_MEGAPIXELS", "0.0001")
    assert load_image(encoded(Image.new("RGB", (10, 10)))).shape == (3, 10, 10)
    with pytest.raises(DataError, match=r"expected at most 0\.0001 megapixels, got 0\.00011"):
        load_image(encoded(Image.new("RGB", (11, 10))))
    monkeypatch.setenv("CAPTUM_ROBUST_MAX_MEGAPIXELS", "many")
    with pytest.raises(DataError, match="MAX_MEGAPIXELS: expected a positive number, got 'many'"):
        load_image(encoded(Image.new("RGB", (1, 1))))


@pytest.mark.parametrize("format", ["EPS", "PCX", "SGI"])
@pytest.mark.parametrize("name", ["holiday.jpg", "holiday.eps", "holiday"])
def test_only_the_named_formats_are_opened(tmp_path, monkeypatch, format, name):
    def run(*_args, **_options):
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(subprocess, "check_call", run)
    data = encoded(Image.new("RGB", (8, 8)), format)
    (tmp_path / name).write_bytes(data)
    for load in load_image, load_mask:
        with pytest.raises(DataError, match="not an image that Pillow can read"):
            load(tmp_path / name)
    if not name.endswith(".jpg"):
        with pytest.warns(UserWarning, match="files left out"):
            assert list_images(tmp_path) == {}


def test_an_opened_program_in_postscript_is_not_run():
    with pytest.raises(DataError, match="got a program in PostScript"):
        pixels_of(Image.open(io.BytesIO(encoded(Image.new("RGB", (8, 8)), "EPS"))))


def test_reading_in_threads_leaves_the_filters_of_warnings_alone():
    data = encoded(Image.new("RGB", (8, 8)))
    filters, first, second = warnings.filters, threading.Event(), threading.Event()

    def read(before, after):
        assert before.wait(10)
        with _decoded(data, "x.png"):
            assert warnings.filters is filters
        after.set()

    with ThreadPoolExecutor(2) as pool:
        one, two = pool.submit(read, first, second), pool.submit(read, second, first)
        first.set()
        one.result()
        two.result()
    assert warnings.filters is filters


def test_a_mask_is_every_pixel_that_is_not_zero(tmp_path):
    values = np.array([[0, 1], [255, 0]], dtype=np.uint8)
    expected = torch.tensor([[False, True], [True, False]])
    assert load_mask(encoded(Image.fromarray(values))).equal(expected)
    palette = Image.fromarray(values)
    palette.putpalette(range(256))
    assert load_mask(encoded(palette)).equal(expected)
    colour = Image.fromarray(np.stack([values, values * 0, values * 0], axis=2))
    assert load_mask(encoded(colour)).equal(expected)
    assert load_mask(encoded(colour.convert("RGBA"))).equal(expected)  # opaque isn't object


def rectangle(value=255, size=(40, 30)):
    values = np.zeros(size[::-1], dtype=np.uint8)
    values[7:12, 13:23] = value
    return values


@pytest.mark.parametrize("quality", [75, 95])
@pytest.mark.parametrize("color", [255, (255, 255, 255), (255, 0, 0), (0, 255, 0)])
@pytest.mark.parametrize("format", ["JPEG", "WEBP", "AVIF", "JPEG2000"])
def test_a_mask_in_a_format_that_blurs_is_what_was_drawn(format, color, quality):
    if format not in Image.SAVE:
        pytest.skip(f"Pillow without {format}")
    mask = Image.new("L" if color == 255 else "RGB", (40, 30))
    empty = encoded(mask, format, quality=quality)
    assert not load_mask(empty).any()
    mask.paste(color, (13, 7, 23, 12))
    data = encoded(mask, format, quality=quality)
    assert load_mask(data).equal(torch.from_numpy(rectangle() > 0))


@pytest.mark.parametrize("values", [(1, 1), (20, 20), (64, 64), (128, 255), (100, 200)])
def test_values_that_jpeg_blurs_are_refused(values):
    mask = np.concatenate([rectangle(value) for value in values])
    with pytest.raises(DataError, match=r"^m\.jpg: mask: .*one bright colour .* JPEG.*as PNG"):
        load_mask(encoded(Image.fromarray(mask), "JPEG"), name="m.jpg")


def voc_colours():
    """The palette of Pascal VOC's masks, as its development kit computes it."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    for index in range(256):
        for bit in range(8):
            for channel in range(3):
                colours[index, channel] |= (index >> (3 * bit + channel) & 1) << (7 - bit)
    return colours


def test_the_void_around_an_object_of_pascal_voc_is_not_object():
    values = np.zeros((30, 40), dtype=np.uint8)
    values[6:13, 12:24] = 255
    values[7:12, 13:23] = 15
    mask = Image.fromarray(values)
    expected = torch.from_numpy(values == 15)
    assert load_mask(encoded(mask), void=255).equal(expected)
    mask.putpalette(voc_colours().tobytes())
    assert load_mask(encoded(mask)).equal(expected)


@pytest.mark.parametrize("colour", [(255, 255, 255), (255, 0, 0)])
@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF"])
def test_a_palette_in_another_order_is_the_mask_that_was_drawn(format, colour):
    mask = Image.new("RGB", (40, 30))
    mask.paste(colour, (13, 7, 23, 12))
    expected = torch.from_numpy(rectangle() > 0)
    adaptive = mask.convert("P", palette=Image.Palette.ADAPTIVE)
    for written in (mask, mask.quantize(2), mask.quantize(2, method=2), adaptive):
        assert load_mask(encoded(written, format)).equal(expected)
    swapped = Image.fromarray((rectangle() == 0).astype(np.uint8))
    swapped.putpalette([*colour, 0, 0, 0])
    assert load_mask(encoded(swapped)).equal(expected)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_a_mask_in_a_mode_whose_0_is_not_black_is_not_inverted(mode):
    mask = Image.fromarray(rectangle()).convert("RGB").convert(mode)
    # Pillow 12 does not read the uncompressed YCbCr TIFF that it writes.
    assert load_mask(encoded(mask, "TIFF", compression="tiff_lzw")).equal(
        torch.from_numpy(rectangle() > 0)
    )


def test_greys_of_a_palette_that_may_be_inverted_are_refused():
    mask = Image.fromarray((rectangle() == 0).astype(np.uint8))
    mask.putpalette([255, 255, 255, 2, 2, 2])
    with pytest.raises(DataError, match=r"^m\.png: mask: .*index 0 isn't the darkest"):
        load_mask(encoded(mask), name="m.png")


@pytest.mark.parametrize("format", ["PNG", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("mode", ["P", "RGB", "ADAPTIVE"])
def test_the_void_of_pascal_voc_is_known_by_its_colour(format, mode):
    values = np.zeros((30, 40), dtype=np.uint8)
    values[6:13, 12:24] = 255
    values[7:12, 13:23] = 15
    mask = Image.fromarray(values)
    mask.putpalette(voc_colours().tobytes())
    if mode != "P":
        mask = mask.convert("RGB")
    if mode == "ADAPTIVE":
        mask = mask.quantize(3)
    assert load_mask(encoded(mask, format)).equal(torch.from_numpy(values == 15))


def test_an_object_of_the_colour_of_void_alone_is_one():
    mask = Image.new("RGB", (40, 30))
    mask.paste((224, 224, 192), (13, 7, 23, 12))
    assert load_mask(encoded(mask)).equal(torch.from_numpy(rectangle() > 0))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("light", [0, 255])
def test_an_object_in_the_alpha_channel_alone_is_found(mode, light, format):
    mask = Image.new(mode[:-1], (40, 30), "white" if light else "black")
    mask.putalpha(Image.fromarray(rectangle()))
    assert load_mask(encoded(mask, format)).equal(torch.from_numpy(rectangle() > 0))


@pytest.mark.parametrize("format", ["PNG", "GIF"])
@pytest.mark.parametrize(
    ("colours", "transparent"),
    [((255, 0), 1), ((255, 255), 1), ((0, 9), 0), ((255, 0), 0), ((255, 9), 0)],
)
def test_a_transparent_index_of_a_palette_is_background(colours, transparent, format):
    indices = (rectangle() > 0).astype(np.uint8)
    mask = Image.fromarray(indices if transparent == 0 else 1 - indices)
    mask.putpalette(np.repeat(colours, 3).astype(np.uint8).tobytes())
    data = encoded(mask, format, transparency=transparent)
    assert load_mask(data).equal(torch.from_numpy(rectangle() > 0))


def test_a_wide_mask_in_which_0_is_white_is_not_inverted():
    values = (65535 - rectangle().astype(np.uint16) * 257).astype(np.uint16)
    mask = encoded(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert load_mask(mask).equal(torch.from_numpy(rectangle() > 0))


def test_listing_is_sorted_by_relative_path_without_hidden_files_or_loops(tmp_path, draw):
    data = draw(tmp_path / "a" / "1.jpg").read_bytes()
    for name in ("b/2.PNG", "._a.jpg", ".hidden/3.png", "notes.txt", "b/@eaDir/2.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    assert list(list_images(tmp_path)) == ["a/1.jpg", "b/2.PNG"]


def test_links_to_folders_are_followed_to_an_end(tmp_path, draw):
    names = "abcdefghij"
    for name in names:
        draw(tmp_path / name / "1.jpg")
        for other in names:
            (tmp_path / name / f"to_{other}").symlink_to(f"../{other}")
    found = list_images(tmp_path)
    assert {f"{name}/1.jpg" for name in names} <= found.keys()  # whatever leads there too
    assert {f"{n}/to_{o}/1.jpg" for n in names for o in names if n != o} <= found.keys()
    assert len(found) < 300


def test_a_folder_that_cannot_be_read_is_said(tmp_path, draw, monkeypatch):
    draw(tmp_path / "a/1.jpg")
    draw(tmp_path / "b/1.jpg")
    scandir = os.scandir

    def refusing(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.warns(UserWarning, match=r"b: left out: Permission denied"):
        assert list(list_images(tmp_path)) == ["a/1.jpg"]


def test_a_colour_pfm_which_pillow_cannot_decode_is_left_out_with_a_warning(tmp_path):
    Image.new("F", (2, 1)).save(tmp_path / "grey.pfm")
    (tmp_path / "colour.pfm").write_bytes(b"PF\n2 1\n-1.0\n" + bytes(24))
    with pytest.warns(UserWarning, match=r"files left out, .*: 1 \.pfm"):
        assert list(list_images(tmp_path)) == ["grey.pfm"]


def test_a_sample_knows_its_size_and_refuses_other_shapes():
    image, boxes = torch.zeros(3, 4, 5), torch.zeros(0, 4)
    sample = Sample(image, None, boxes, "a")
    assert sample.original_size == sample.size == (4, 5)
    with pytest.raises(ValueError, match="3×H×W"):
        Sample(torch.zeros(1, 4, 5), None, boxes, "a")
    with pytest.raises(ValueError, match="M×4"):
        Sample(image, None, torch.zeros(4), "a")
    with pytest.raises(ValueError, match="mask"):
        Sample(image, None, boxes, "a", mask=torch.zeros(5, 4, dtype=torch.bool))


def test_a_data_error_survives_pickling():
    assert str(pickle.loads(pickle.dumps(DataError("a.csv:3: bad")))) == "a.csv:3: bad"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "GIF", "WEBP"])
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=40)
def test_flipped_bytes_give_an_image_or_a_data_error_and_nothing_else(format, flips):
    data = bytearray(encoded(Image.linear_gradient("L").resize((16, 12)), format))
    for position, value in flips:
        data[position % len(data)] = value
    with suppress(DataError):
        image = load_image(bytes(data))
        assert 0 <= image.min() <= image.max() <= 1


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_may_never_end_is_not_read(tmp_path, kind):
    path = tmp_path / "endless.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=rf"endless\.png: a {kind}, no file"):
        load_image(path)


def test_a_file_larger_than_any_image_is_not_read(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(DataError, match=r"sparse\.png: expected at most 1073741824 bytes"):
        load_image(path)


@pytest.mark.parametrize("name", ["\ud800.png", "a\0.png"])
def test_a_name_that_no_file_has_is_an_error_of_its_image(tmp_path, name):
    with pytest.raises(DataError, match="no name of a file"):
        load_image(tmp_path / name)


@pytest.mark.parametrize(
    ("box", "words"), [((1, 1, 8, 4), "partly lies outside"), ((6, 0, 8, 4), "lies outside")]
)
def test_a_box_over_the_edge_is_outside_in_part(box, words):
    with pytest.raises(DataError, match=rf"a: box 0 \(.*\) {words} the image of 5×4 pixels"):
        Sample(torch.zeros(3, 4, 5), None, torch.tensor([box]).float(), "a")
