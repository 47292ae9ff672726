"""Small files that claim or unpack to any size are refused in one line, quickly and in little
memory."""

import json
import struct
import zipfile
import zlib

import fuzz_inputs
import fuzzing
import h5py
import numpy as np
import pytest
from PIL import Image

import dataset_setup
import frame_prediction

HUGE = (100_000, 100_000, 31)


def packed_zeros(gibibytes):
    """A zlib stream of so many zeros, made of one block again and again; its checksum is wrong,
    which shows at its end only."""
    packer = zlib.compressobj(9)
    head = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    return head + block * (64 * gibibytes) + packer.flush()


def npy_header(shape):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text.encode() + b"\n"


def npy(path):
    path.write_bytes(npy_header(HUGE) + bytes(5000))


def npz(path):
    """An archive whose one array unpacks to 4 GiB less a little."""
    raw = packed_zeros(3)[2:]  # without zlib's own header
    size = 3 * 2**30
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cube.npy", b"")
    body, name = path.read_bytes(), b"cube.npy"
    facts = struct.pack("<3I2H", 0, len(raw), size, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<5H", 20, 0, 8, 0, 0) + facts + name
    central = body.index(b"PK\x01\x02")
    entry = b"PK\x01\x02" + struct.pack("<6H", 20, 20, 0, 8, 0, 0) + facts
    entry += struct.pack("<3H2I", 0, 0, 0, 0, 0) + name
    place = len(local) + len(raw)
    end = b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, 1, 1, len(entry), place, 0)
    assert central
    path.write_bytes(local + raw + entry + end)


def v73(path):
    with h5py.File(path, "w") as file:  # no chunk is written: all is the fill value
        file.create_dataset("cube", HUGE[::-1], np.float32, chunks=(31, 64, 64), compression="gzip")


def v73_packed(path):
    """A dataset whose one chunk unpacks to 3 GiB."""
    side = 3 * 2**30 // 4 // 31 // 4096
    shape = (31, 4096, side)
    with h5py.File(path, "w") as file:
        cube = file.create_dataset("cube", shape, np.float32, chunks=shape, compression="gzip")
        cube.id.write_direct_chunk((0, 0, 0), packed_zeros(3))


def v73_wavelengths(path):
    with h5py.File(path, "w") as file:
        file["cube"] = fuzz_inputs.cube_of(fuzz_inputs.picture()).T
        file.create_dataset("bands", (10**11,), np.float64, chunks=(1024,))


def v5(path):
    packed = packed_zeros(3)
    tag = struct.pack("<2I", 15, len(packed))
    path.write_bytes(b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM" + tag + packed)


def envi(path):
    text = "ENVI\nsamples = 100000\nlines = 100000\nbands = 31\ndata type = 4\ninterleave = bsq\n"
    path.write_text(text + "byte order = 0\nheader offset = 0\n")
    path.with_suffix(".img").write_bytes(bytes(4000))


CUBES = {"c.npy": npy, "c.npz": npz, "fill.mat": v73, "chunk.mat": v73_packed}
CUBES |= {"bands.mat": v73_wavelengths, "v5.mat": v5, "c.hdr": envi}


def png(path, width=31000, height=31000):
    """Rows of zeros: below a thousandth of the picture's size."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(3 * width + 1)) for _ in range(height // 100))
    facts = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", facts) + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def jpeg(path, side=31000):
    Image.new("RGB", (64, 64)).save(path)
    data = bytearray(path.read_bytes())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">2H", side, side)
    path.write_bytes(data)


def largest_jpeg(path):
    jpeg(path, 65535)


def bmp(path):
    facts = struct.pack("<IiiHHIIiiII", 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0)
    path.write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + facts + bytes(3000))


def tiff(path):
    Image.new("RGB", (64, 64)).save(path, compression="tiff_deflate")
    data = path.read_bytes()
    for old in (struct.pack("<HHIHH", tag, 4, 1, 64, 0) for tag in (256, 257)):
        data = data.replace(old, old[:8] + struct.pack("<I", 31000))
    data = data.replace(struct.pack("<HHII", 256, 3, 1, 64), struct.pack("<HHII", 256, 4, 1, 31000))
    data = data.replace(struct.pack("<HHII", 257, 3, 1, 64), struct.pack("<HHII", 257, 4, 1, 31000))
    assert struct.pack("<I", 31000) in data
    path.write_bytes(data)


def program(path):
    """PostScript called a photo: Pillow would start Ghostscript for it."""
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    )


PHOTOS = {"p.png": png, "p.jpg": jpeg, "large.jpg": largest_jpeg, "p.bmp": bmp, "p.tif": tiff}
PHOTOS |= {"program.png": program}


def assert_refused(outcome, name):
    assert outcome.refused and not outcome.problem, f"{outcome.problem}: {outcome.text}"
    assert name in outcome.text


@pytest.fixture
def in_one_process(monkeypatch):
    monkeypatch.setattr(dataset_setup, "run_jobs", fuzz_inputs.without_processes)
    monkeypatch.setitem(frame_prediction.FACTORIES, "hsifusion", ("standin_model", "create"))


@pytest.mark.parametrize("name", CUBES)
def test_a_cube_larger_than_its_file_can_be(name, tmp_path, in_one_process):
    (tmp_path / "cubes").mkdir()
    CUBES[name](tmp_path / "cubes" / name)
    Image.fromarray(fuzz_inputs.picture()).save((tmp_path / "cubes" / name).with_suffix(".png"))
    outcome = fuzzing.attempt(lambda: fuzz_inputs.stage(tmp_path), tmp_path / "log")
    assert_refused(outcome, name.removesuffix(".hdr"))


@pytest.mark.parametrize("name", PHOTOS)
def test_a_photo_larger_than_its_file_can_be(name, tmp_path, in_one_process):
    PHOTOS[name](tmp_path / name)
    (tmp_path / name).rename(tmp_path / f"photo{(tmp_path / name).suffix}")
    fuzz_inputs.write_model(tmp_path / "m.ckpt")
    outcome = fuzzing.attempt(lambda: fuzz_inputs.predict(tmp_path), tmp_path / "log")
    assert_refused(outcome, "photo")


@pytest.mark.parametrize("change", [{"width": 10**9}, {"width": 60_000}, {"width": 2**70}])
def test_a_checkpoint_that_asks_for_a_giant_model(change, tmp_path, in_one_process):
    import torch

    fuzz_inputs.write_model(tmp_path / "m.ckpt")
    state = torch.load(tmp_path / "m.ckpt")
    state["model_config"] |= change
    torch.save(state, tmp_path / "m.ckpt")
    outcome = fuzzing.attempt(lambda: fuzz_inputs.weights_of(tmp_path), tmp_path / "log")
    assert_refused(outcome, "m.ckpt")


def test_real_models_of_any_depth_are_refused_by_their_weights(tmp_path):
    import torch

    import hsifusion_v252_complete
    import sharp_v322_hardened

    for module, kind in ((hsifusion_v252_complete, "hsifusion"), (sharp_v322_hardened, "sharp")):
        config = {"model_size": "tiny", "depths": [50_000] * 3}
        state = {"model": kind, "model_config": config, "state_dict": {"a": torch.ones(1)}}
        torch.save(state, tmp_path / "m.ckpt")
        outcome = fuzzing.attempt(
            lambda module=module: module.from_pretrained(str(tmp_path / "m.ckpt")),
            tmp_path / "log",
        )
        assert_refused(outcome, "m.ckpt")


@pytest.mark.parametrize("text", ["[" * 10**6, '{"epochs": ' * 10**5, json.dumps(["x"] * 10**6)])
def test_a_configuration_of_any_depth_and_length(text, tmp_path):
    (tmp_path / "c.json").write_text(text)
    outcome = fuzzing.attempt(lambda: fuzz_inputs.parse(tmp_path), tmp_path / "log")
    assert_refused(outcome, "c.json")
