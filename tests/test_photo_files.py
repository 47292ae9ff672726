"""Photos as they are: modes, bit depths, colour profiles, orientation, and what is not read."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

import cube_files
from common_utils_v32 import UserError
from photo_files import read_photo

RGB_SHAPE = (9, 12, 3)


@pytest.mark.parametrize(
    "mode, remark",
    [
        ("RGB", None),
        ("L", "grey repeated"),
        ("RGBA", "alpha dropped"),
        ("I;16", "grey repeated"),
        ("P", None),
        ("CMYK", None),
    ],
)
def test_photos_of_every_mode_are_rgb_and_what_changed_is_said(tmp_path, mode, remark):
    pixels = np.random.default_rng(0).integers(20, 201, RGB_SHAPE, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "a.tif")
    rgb, remarks, _ = read_photo(tmp_path / "a.tif", tmp_path)
    assert rgb.shape == RGB_SHAPE and rgb.dtype == (np.uint16 if mode == "I;16" else np.uint8)
    if mode in ("L", "I;16"):
        assert (rgb == rgb[..., :1]).all()
    if mode in ("RGB", "RGBA"):
        assert (rgb[..., 0] == pixels[..., 0]).all()
    if mode == "I;16":
        assert (rgb[..., 0] == 257 * pixels[..., 0].astype(int)).all()
    assert (remark is None) == (remarks == []) and str(remark or "") in " ".join(remarks)


def test_exif_orientation_is_applied_and_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 70)).save(tmp_path / "a.jpg", exif=exif)
    rgb, remarks, _ = read_photo(tmp_path / "a.jpg", tmp_path)
    assert rgb.shape == (90, 70, 3) and remarks == ["turned as its EXIF says"]


def test_photos_that_hold_no_rgb_are_refused(tmp_path):
    Image.fromarray(np.zeros((4, 5), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating-point"):
        read_photo(tmp_path / "float.tif", tmp_path)
    Image.fromarray(np.full((4, 5), 70000, np.int32)).save(tmp_path / "deep.tif")
    with pytest.raises(UserError, match="beyond 16 bits"):
        read_photo(tmp_path / "deep.tif", tmp_path)
    write_deep_png(tmp_path / "grey.png", np.zeros((9, 12, 2), np.uint16))
    with pytest.raises(UserError, match="grey and alpha of 16 bits; save it as grey"):
        read_photo(tmp_path / "grey.png", tmp_path)
    np.save(tmp_path / "floats.npy", np.zeros(RGB_SHAPE, np.float32))
    with pytest.raises(UserError, match="uint16, found .*float32"):
        read_photo(tmp_path / "floats.npy", tmp_path)


def test_a_big_photo_is_mapped_to_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(cube_files, "MAPPED_BYTES", 1000)
    pixels = np.random.default_rng(0).integers(0, 256, (1100, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    rgb, _, _ = read_photo(tmp_path / "a.png", tmp_path)
    assert isinstance(rgb, np.memmap) and np.array_equal(rgb, pixels)
    monkeypatch.delattr(cube_files.mmap, "MADV_DONTNEED", raising=False)  # as on Windows
    assert np.array_equal(read_photo(tmp_path / "a.png", tmp_path)[0], pixels)


# --- deep files


def write_deep_png(path, pixels):
    """A PNG of 16-bit RGB, or grey and alpha, its rows coded as differences to the left, by zlib
    and struct alone."""
    height, width, channels = pixels.shape
    rows = pixels.astype(">u2").tobytes()
    rows = np.frombuffer(rows, np.uint8).reshape(height, width * 2 * channels)
    coded = rows.copy()
    coded[:, 2 * channels :] -= rows[:, : -2 * channels]
    body = b"".join(b"\x01" + row.tobytes() for row in coded)

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 2: 4}[channels], 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(body)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@pytest.mark.parametrize("kind", ["png", "tiff", "tiff, big-endian", "npy"])
def test_values_of_16_bits_keep_all_of_them(tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 65536, RGB_SHAPE).astype(np.uint16)
    path = tmp_path / ("a." + kind.split(",")[0])
    if kind == "png":
        write_deep_png(path, pixels)
    elif kind == "npy":
        np.save(path, pixels)
    else:
        tifffile = pytest.importorskip("tifffile")
        order = ">" if "big" in kind else "<"
        tifffile.imwrite(path, pixels, photometric="rgb", byteorder=order)
    rgb, remarks, _ = read_photo(path, tmp_path)
    assert rgb.dtype == np.uint16 and np.array_equal(rgb, pixels) and remarks == []


@pytest.mark.parametrize("turned", [1, 5, 6, 7, 8])
@pytest.mark.parametrize("planes, packing", [("separate", None), ("contig", "zlib")])
def test_a_tiff_of_16_bits_that_pillow_would_cut_or_misread_is_read_whole(
    tmp_path, planes, packing, turned
):
    tifffile = pytest.importorskip("tifffile")
    pixels = np.random.default_rng(0).integers(0, 65536, RGB_SHAPE).astype(np.uint16)
    stored = pixels.transpose(2, 0, 1) if planes == "separate" else pixels
    how = {"photometric": "rgb", "planarconfig": planes, "compression": packing}
    tag = (274, 3, 1, turned, True)
    tifffile.imwrite(tmp_path / "a.tif", stored, extratags=[tag], **how)
    upright = {5: pixels.swapaxes(0, 1), 6: np.rot90(pixels, -1), 8: np.rot90(pixels)}
    upright |= {1: pixels, 7: np.rot90(pixels, -1)[::-1]}
    rgb = read_photo(tmp_path / "a.tif", tmp_path).rgb
    assert np.array_equal(rgb, upright[turned])


def test_a_tiff_of_inks_is_not_taken_for_rgb(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    inks = np.zeros((9, 12, 4), np.uint16)
    how = {"photometric": "separated", "compression": "zlib"}
    tifffile.imwrite(tmp_path / "a.tif", inks, **how)
    with pytest.raises((UserError, OSError)):
        read_photo(tmp_path / "a.tif", tmp_path)


def test_a_file_of_many_images_says_that_the_first_is_taken(tmp_path):
    frames = [Image.new("L", (12, 9), shade) for shade in (0, 100, 200)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    remarks = read_photo(tmp_path / "a.tif", tmp_path).remarks
    assert remarks == ["grey repeated into R, G and B", "the first of 3 images"]
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[: len(content) // 2])  # in the second image
    photo = read_photo(tmp_path / "a.tif", tmp_path)
    assert not photo.rgb.any() and photo.remarks[-1].startswith("the first of ")


def test_12_bits_in_a_16_bit_file_reach_from_black_to_white(tmp_path):
    pixels = np.linspace(0, 4095, 9 * 12 * 3).reshape(RGB_SHAPE).astype(np.uint16)
    write_deep_png(tmp_path / "a.png", pixels)
    rgb, remarks, _ = read_photo(tmp_path / "a.png", tmp_path)
    assert rgb.max() == 65535 and len(np.unique(rgb)) == len(np.unique(pixels)) > 300
    assert remarks == ["taken as 12 bits: no value is above 4095"]


# --- colour profiles and what a file says


def profile_of(gamma):
    """A colour profile with the primaries of Display P3 and a plain gamma, by its bytes."""

    def fixed(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(*values):
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"Some Wide Gamut"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" * 79
    text += b"\0" * (-len(text) % 4)
    tags = {
        b"desc": text,
        b"rXYZ": xyz(0.5151, 0.2412, -0.0011),
        b"gXYZ": xyz(0.2920, 0.6922, 0.0419),
        b"bXYZ": xyz(0.1571, 0.0666, 0.7841),
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for key, value in tags.items():
        table += key + struct.pack(">II", offset + len(data), len(value))
        data += value
    size = offset + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02400000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp"
    head = head.ljust(68, b"\0") + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data


def test_a_colour_profile_that_is_not_srgb_is_converted_and_said(tmp_path):
    pixels = np.full(RGB_SHAPE, (200, 60, 40), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png", icc_profile=profile_of(2.2))
    rgb, remarks, ordinary = read_photo(tmp_path / "a.png", tmp_path)
    assert remarks == ["colour profile Some Wide Gamut converted to sRGB"] and ordinary
    assert rgb[0, 0, 0] > 208 and rgb[0, 0, 1] < 55  # P3's red is a deeper one than sRGB's
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "b.png", icc_profile=srgb)
    rgb, remarks, ordinary = read_photo(tmp_path / "b.png", tmp_path)
    assert np.array_equal(rgb, pixels) and remarks == [] and "profile" in ordinary


def test_a_cameras_exif_tells_an_ordinary_photo(tmp_path):
    exif = Image.Exif()
    exif[271] = "Some Maker"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGB", (8, 8)).save(tmp_path / "b.jpg")
    assert "EXIF" in read_photo(tmp_path / "a.jpg", tmp_path).ordinary
    assert read_photo(tmp_path / "b.jpg", tmp_path).ordinary == ""


@pytest.mark.parametrize("name", ["a.dng", "a.CR2", "a.nef"])
def test_a_camera_raw_file_is_refused_not_read_as_its_thumbnail(tmp_path, name):
    encoded = io.BytesIO()
    Image.new("RGB", (8, 8)).save(encoded, "TIFF")
    (tmp_path / name).write_bytes(encoded.getvalue())
    with pytest.raises(UserError, match="camera raw file; develop it"):
        read_photo(tmp_path / name, tmp_path)


def test_a_raw_file_under_another_name_is_refused_too(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tif", tiffinfo={50706: bytes([1, 4, 0, 0])})
    with pytest.raises(UserError, match="camera raw file"):
        read_photo(tmp_path / "a.tif", tmp_path)


@pytest.mark.parametrize("name", ["a.heic", "film.MP4"])
def test_formats_that_are_not_read_say_what_to_do(tmp_path, name):
    (tmp_path / name).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="is not read; convert it to JPEG or PNG"):
        read_photo(tmp_path / name, tmp_path)


def test_a_scenes_photo_of_16_bits_is_refused_not_cut_to_8(tmp_path):
    write_deep_png(tmp_path / "a.png", np.full(RGB_SHAPE, 4080, np.uint16))
    with pytest.raises(UserError, match="a.png: 16 bits a channel; an 8-bit RGB image is needed"):
        cube_files.read_rgb(tmp_path / "a.png")
