"""Each row of docs/formats.md, tried with files that plain bytes, scipy, h5py, Pillow and tifffile
write."""

import gzip
import importlib.util
import re

import h5py
import numpy as np
import pytest
import scipy.io
from conftest import ROOT, read_index, run_setup
from PIL import Image

import cube_files
import dataset_setup
import sharp_inference
import terminal
from common_utils_v32 import UserError
from cube_files import read_cube, read_wavelengths

SIZE = (20, 24)
BANDS = 12
NM = [450.0 + 20 * band for band in range(BANDS)]
TYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
AXES = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}
ROWS = {}


@pytest.fixture(autouse=True)
def no_contact_sheet(monkeypatch):
    monkeypatch.setattr(dataset_setup, "contact_sheet", lambda root, index: None)


def row(test):
    """The test of the row that has its name in docs/formats.md."""
    ROWS[test.__name__.replace("_", " ").strip()] = test
    return test


def cube_of(seed=0, bands=BANDS):
    return np.random.default_rng(seed).uniform(0.05, 0.95, (*SIZE, bands)).astype(np.float32)


def write_envi(header, cube, data=None, interleave="bsq", kind=4, order=0, offset=0, **lines):
    """An ENVI header and its data in plain bytes; a line given as None is left out."""
    height, width, bands = cube.shape
    stored = cube.transpose(AXES[interleave.lower()]).astype("<>"[order or 0] + TYPES[kind])
    content = bytes(offset) + stored.tobytes()
    data = data or header.with_suffix(".img")
    data.write_bytes(gzip.compress(content) if data.suffix == ".gz" else content)
    fields = {"samples": width, "lines": height, "bands": bands, "header offset": offset}
    fields |= {"file type": "ENVI Standard", "data type": kind, "interleave": interleave}
    fields |= {"byte order": order, "wavelength units": "Nanometers"}
    fields["wavelength"] = "{\n" + ",\n".join(str(nm) for nm in NM[:bands]) + "}"
    fields |= {name.replace("_", " "): line for name, line in lines.items()}
    text = "".join(f"{name} = {line}\n" for name, line in fields.items() if line is not None)
    header.write_text(f"ENVI\ndescription = {{\n  a leaf, x = 3}}\n; a comment\n{text}", "latin-1")
    return header


def stage(folder, staged, *flags):
    """The index of a folder of cubes without photos, staged."""
    for name in folder.glob("*"):
        assert name.exists()
    run_setup(
        *("--cubes", folder, "--output-root", staged, "--patch-size", 16, "--workers", 1),
        *("--val-fraction", 0, "--dtype", "float32", "--render-rgb", *flags),
    )
    return read_index(staged)


def staged_cube(staged, number=0):
    return np.load(staged / read_index(staged)["splits"]["train"][number]["cube"])


def refused(words, call, *args, **kwargs):
    """`call` complains in one line that has these words."""
    with pytest.raises(UserError, match=words) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "cubes").mkdir()
    return tmp_path / "cubes"


# --- cubes


@row
def envi_data_file(folder):
    cube = cube_of()
    for number, suffix in enumerate(["", ".dat", ".RAW", ".bil", ".bip", ".hyspex"]):
        header = folder / f"a{number}.hdr"
        write_envi(header, cube, folder / f"a{number}{suffix}")
        assert np.array_equal(read_cube(header), cube)
    header = write_envi(folder / "leaf.bil.hdr", cube, folder / "leaf.bil", "bil")
    assert np.array_equal(read_cube(header), cube)
    (folder / "leaf.bil").write_bytes((folder / "leaf.bil").read_bytes()[:-1])
    refused("leaf.bil: holds .* bytes, leaf.bil.hdr speaks of", read_cube, header)
    (folder / "leaf.bil").unlink()
    refused("leaf.bil.hdr: no data file", read_cube, header)
    header.write_text("BYTEORDER I\nLAYOUT BIL\n")
    refused("leaf.bil.hdr: not an ENVI header", read_cube, header)
    write_envi(header, cube, file_type="ENVI Spectral Library")
    refused("leaf.bil.hdr: ENVI Spectral Library", read_cube, header)
    write_envi(header, cube[..., :1], file_type="ENVI Classification", wavelength=None)
    refused("leaf.bil.hdr: ENVI Classification, not an image", read_cube, header)
    write_envi(header, cube, bands=1, file_type="ENVI Spectral Library")
    refused("leaf.bil.hdr: ENVI Spectral Library", stage, folder, folder / "s")
    write_envi(header, cube).with_suffix(".img").write_bytes(b"")
    refused("leaf.bil.img: holds 0 bytes", read_cube, header)


@row
def envi_header_text(folder):
    cube = cube_of()
    header = write_envi(folder / "a.hdr", cube)
    plain = header.read_text("latin-1")
    for changed in (
        plain.replace("\n", "\r\n"),
        plain.replace("\n", "\r"),
        "\ufeff\n" + plain.replace("ENVI", "envi", 1),
        plain.upper(),
        plain.replace(" = ", "=").replace("data type", "data\ttype"),
        plain.replace(" = ", "\t =  ").replace("header offset", " header   offset"),
        plain.replace("wavelength = {", "wavelength =\n {"),
        plain.replace("}", ",\n}").replace("wavelength = {", "wavelength = {\n; {nm},\n"),
        plain.replace("{\n  a leaf, x = 3", "{lines = 3\n bands = 4 {5} é\nsamples = 6"),
        plain + "map info = {UTM, 1, units=Meters}\nHistory\n = \nbbl =\n",
    ):
        header.write_bytes(changed.encode())
        assert np.array_equal(read_cube(header), cube) and read_wavelengths(header) == NM
    order = [3, 1, 0, *range(11, 3, -1), 1]  # as where two sensors meet, and bands count twice
    write_envi(header, cube, wavelength="{" + ", ".join(str(NM[band]) for band in order) + "}")
    assert read_wavelengths(header) == [NM[band] for band in order]
    for text, words in [("", "not an ENVI header"), ("#?RADIANCE\n", "not an ENVI header")]:
        header.write_text(text)
        refused(f"a.hdr: {words}", read_cube, header)


@pytest.mark.parametrize("data, header", [("leaf", "leaf.hdr"), ("leaf.bil", "leaf.bil.hdr")])
def test_changed_envi_data_is_staged_again_and_the_scene_keeps_its_photo(
    folder, tmp_path, data, header, capsys
):
    Image.new("RGB", SIZE[::-1]).save(folder / "leaf.png")
    write_envi(folder / header, cube_of(0), folder / data, "bil")
    flags = ("--render-rgb", "missing")
    index = stage(folder, tmp_path / "staged", *flags)
    assert index["splits"]["train"][0]["name"] == "leaf"
    assert not index["splits"]["train"][0]["rendered"]
    stage(folder, tmp_path / "staged", *flags)
    assert "(1 were there)" in capsys.readouterr().out
    write_envi(folder / "other.hdr", cube_of(1), folder / data, "bil")
    (folder / "other.hdr").unlink()
    stage(folder, tmp_path / "staged", *flags)
    assert "(0 were there)" in capsys.readouterr().out
    assert np.array_equal(staged_cube(tmp_path / "staged"), cube_of(1))


@row
def envi_layout(folder):
    cube = (cube_of() * 200).round()
    header = folder / "a.hdr"
    for number, (interleave, kind) in enumerate(zip(["bsq", "BIL", "Bip"] * 3, TYPES, strict=True)):
        order, offset = number % 2, 7 * number
        write_envi(header, cube, None, interleave, kind, order, offset)
        assert np.array_equal(read_cube(header), cube)
    write_envi(header, cube, byte_order=None)
    assert np.array_equal(read_cube(header), cube)
    assert "no byte order; read as little-endian" in cube_files.read_stored(header)[1].remarks[0]
    (folder / "a.img").write_bytes((folder / "a.img").read_bytes() + b"tail")
    assert "4 bytes more" in cube_files.read_stored(header)[1].remarks[1]
    for lines, words in [
        ({"data_type": 6}, "data type 6 is complex"),
        ({"data_type": 7}, "data type 7 is not one"),
        ({"data_type": "float"}, "data type is not of numbers"),
        ({"interleave ": "bsx"}, "interleave = bsx"),
        ({"byte_order": 2}, "byte order = 2"),
        ({"major_frame_offsets": "{0, 4}"}, "frame offsets are not read"),
        ({"lines": None}, "no line `lines =`"),
        ({"lines": 19.7}, "lines = 19.7; write a whole number"),
        ({"lines": -20, "samples": -24}, "lines = -20; write a whole"),
        ({"lines": "inf"}, "lines = inf; write a whole"),
        ({"header_offset": -16}, "header offset = -16; write a whole"),
        ({"wavelength": "{450, x}"}, "wavelength is not of numbers"),
        ({"wavelength": "{450, 460}"}, "2 values of wavelength, not 12"),
    ]:
        write_envi(header, cube, **lines)
        assert "replace" not in refused(f"a.hdr: .*{words}", read_cube, header)


@row
def envi_gzip(folder):
    cube = cube_of()
    write_envi(folder / "a.hdr", cube, folder / "a.raw.gz", offset=9)
    assert np.array_equal(read_cube(folder / "a.hdr"), cube)
    write_envi(folder / "b.hdr", cube, folder / "b.gz", file_compression=1)
    (folder / "b.gz").rename(folder / "b.img")
    assert np.array_equal(read_cube(folder / "b.hdr"), cube)
    (folder / "b.img").write_bytes(gzip.compress(b"") + (folder / "b.img").read_bytes())
    (folder / "b.img").rename(folder / "b.IMG.GZ")
    assert np.array_equal(read_cube(folder / "b.hdr"), cube)
    packed = (folder / "b.IMG.GZ").read_bytes()
    for content in (packed[:-2000], packed[:200] + bytes(99) + packed[299:], cube.tobytes()):
        (folder / "b.img").write_bytes(content)
        refused("b.img: not whole gzip data .*b.hdr", read_cube, folder / "b.hdr")


@row
def envi_no_data(folder, tmp_path):
    counts = (cube_of() * 10000).round()
    counts[2:5, 3] = -9999
    lines = {"data ignore value": -9999, "reflectance scale factor": 10000}
    write_envi(folder / "a.hdr", counts, kind=2, **lines)
    message = refused("a.hdr: 3 pixels hold no data", stage, folder, tmp_path / "s")
    assert "--scale" not in message and "--fill" in message
    index = stage(folder, tmp_path / "filled", "--fill", 0.25)
    cube = staged_cube(tmp_path / "filled")
    assert (cube[2:5, 3] == 0.25).all() and np.allclose(cube[0], counts[0] / 10000)
    entry = index["splits"]["train"][0]
    assert entry["filled"] == {"pixels": 3, "share": 3 / 480}


@row
def envi_scale(folder, tmp_path):
    cube = cube_of()
    write_envi(folder / "a.hdr", (cube * 10000).round(), kind=12, reflectance_scale_factor=1e4)
    assert np.allclose(read_cube(folder / "a.hdr"), cube, atol=1e-4)
    refused("a.hdr: .*10000 is applied.*--scale", stage, folder, tmp_path / "s", "--scale", 10000)
    np.save(tmp_path / "w.npy", cube)
    refused("--white out", stage, folder, tmp_path / "s", "--white", tmp_path / "w.npy")
    gains = {"data_gain_values": f"{{{', '.join(['0.5'] * 12)}}}"}
    gains["data_offset_values"] = f"{{{', '.join(['0.01'] * 12)}}}"
    write_envi(folder / "b.hdr", cube, **gains)
    assert np.allclose(read_cube(folder / "b.hdr"), cube / 2 + 0.01, atol=1e-6)
    write_envi(folder / "b.hdr", cube, reflectance_scale_factor=2, **gains)
    refused("b.hdr: both", read_cube, folder / "b.hdr")
    write_envi(folder / "b.hdr", cube, reflectance_scale_factor=0.1)
    (folder / "a.hdr").unlink()
    assert "--scale" not in refused("values from", stage, folder, tmp_path / "t")
    write_envi(folder / "b.hdr", cube, reflectance_scale_factor=0)
    refused("scale factor = 0", read_cube, folder / "b.hdr")


@row
def envi_bad_bands(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(terminal, "_said", set())
    cube, header = cube_of(), folder / "a.hdr"
    cube[..., 3] = -9999
    marks = ["1"] * 12
    marks[3] = marks[10] = "0"
    lines = {"bbl": "{" + ", ".join(marks) + "}", "data_ignore_value": -9999}
    write_envi(header, cube, **lines)
    kept = [band for band in range(12) if band not in (3, 10)]
    for said in (True, False):  # as a trainer does that reads raw files: once
        assert np.array_equal(read_cube(header, bands=10), cube[..., kept])
        assert ("dropped: 4, 11" in capsys.readouterr().out) == said
    assert read_wavelengths(header) == [NM[band] for band in kept]
    index = stage(folder, tmp_path / "s")
    assert index["bands"] == 10 and index["wavelengths"] == [NM[band] for band in kept]
    said = [line for line in capsys.readouterr().out.splitlines() if "bbl" in line]
    assert len(said) == 1 and "2 of 12 bands" in said[0] and said[0].endswith(": 4, 11")
    assert np.array_equal(staged_cube(tmp_path / "s"), cube[..., kept])
    write_envi(header, cube, bbl="{0, 1}")
    refused("2 values of bbl, not 12", read_cube, header)
    write_envi(header, cube, bbl="{" + ", ".join("0" * 12) + "}")
    refused("marks every band bad", read_cube, header)


@row
def envi_wavelengths(folder, tmp_path):
    cube, header = cube_of(), folder / "a.hdr"
    nm = np.array(NM)
    for unit, values in [
        ("Nanometers", nm),
        ("Micrometers", nm / 1000),
        ("um", nm / 1000),
        ("Unknown", nm / 1000),
        ("Index", nm),
        (None, nm),
        ("Angstroms", nm * 10),
        ("Wavenumber", 1e7 / nm),
        ("GHz", 299792458 / nm),
    ]:
        lines = {"wavelength": f"{{{', '.join(map(str, values))}}}", "wavelength units": unit}
        write_envi(header, cube, fwhm=lines["wavelength"], **lines)
        assert read_wavelengths(header) == pytest.approx(NM)
    named = ", ".join(f"Band {band} ({nm:g} Nanometers)" for band, nm in enumerate(NM))
    write_envi(header, cube, wavelength=None, band_names="{" + named + "}")
    assert read_wavelengths(header) == NM
    write_envi(header, cube, wavelength="{" + ", ".join(map(str, range(1, 13))) + "}")
    assert read_wavelengths(header) is None
    for unit, factor in [("Furlongs", 1), (None, 10), ("Micrometers", 1)]:
        lines = {"wavelength": f"{{{', '.join(map(str, nm * factor))}}}", "wavelength units": unit}
        write_envi(header, cube, **lines)
        refused("a.hdr: wavelengths .*--wavelengths", stage, folder, tmp_path / "s")
    index = stage(folder, tmp_path / "s", "--wavelengths", 450, 670)
    assert index["wavelengths"] == pytest.approx(NM)


def write_v73(path, arrays):
    """HDF5 as MATLAB lays it out: axes turned, structs as groups, cells as references."""
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, array in arrays.items():
            if isinstance(array, list):
                kept = [file.create_dataset(f"#refs#/{n}", data=a.T) for n, a in enumerate(array)]
                file.create_dataset(name, data=[item.ref for item in kept], dtype=h5py.ref_dtype)
            else:
                file[name] = np.asarray(array).T
    return path


@row
def mat_v7_3(folder):
    cube, path = cube_of(), folder / "a.mat"
    write_v73(path, {"RAD": cube, "Lambda": np.array([NM]), "other": cube[:2]})
    assert np.array_equal(read_cube(path, bands=12), cube) and read_wavelengths(path) == NM
    assert np.array_equal(read_cube(path, key="OTHER", bands=12), cube[:2])
    write_v73(path, {"wl": np.array([NM]), "more/bands": np.array([NM[:5]])})
    assert read_wavelengths(path) == NM
    write_v73(path, {"left": cube, "right": cube})
    refused("--cube-key, one of: left, right", read_cube, path)
    write_v73(path, {"cube": cube.transpose(1, 2, 0)})
    refused("--axes", read_cube, path, bands=12, rgb_shape=(12, 12))


@row
def mat_v5(folder):
    cube, path = cube_of(), folder / "a.mat"
    for file_format in ("4", "5"):
        stored = cube[..., 0] if file_format == "4" else cube
        scipy.io.savemat(path, {"RAD": stored, "WaveLength": NM}, format=file_format)
        assert read_wavelengths(path) == NM
    assert np.array_equal(read_cube(path, bands=12), cube)
    scipy.io.savemat(path, {"left": cube, "right": cube})
    refused("--cube-key, one of: left, right", read_cube, path)


@row
def mat_structs(folder, tmp_path):
    cube, path = cube_of(), folder / "a.mat"
    deep = {"hcube": {"inner": {"DataCube": cube, "Mask": cube > 0.5}, "Wavelength": NM}}
    flat = {"hcube/inner/DataCube": cube, "hcube/Wavelength": np.array([NM])}
    for write in (lambda: scipy.io.savemat(path, deep), lambda: write_v73(path, flat)):
        write()
        for key in (None, "hcube/inner/DataCube", "HCUBE/inner/datacube", "datacube"):
            assert np.array_equal(read_cube(path, key=key, bands=12), cube)
        assert read_wavelengths(path) == NM
        refused(
            "no array hcube/nothing in it.*hcube/inner/DataCube",
            read_cube,
            path,
            key="hcube/nothing",
        )
    cells = np.empty(2, object)
    cells[:] = [cube, cube / 2]
    for write in (
        lambda: scipy.io.savemat(path, {"all": {"scenes": cells}}),
        lambda: write_v73(path, {"all/scenes": [cube, cube / 2]}),
    ):
        write()
        assert np.array_equal(read_cube(path, key="all/scenes/2", bands=12), cube / 2)
    path.unlink()
    write_v73(
        folder / "b.mat",
        {"hcube/DataCube": cube_of(0, 31), "hcube/Wavelength": range(420, 721, 10)},
    )
    assert stage(folder, tmp_path / "s")["wavelengths"] == list(range(420, 721, 10))


@row
def mat_classes(folder):
    cube, path = cube_of(), folder / "a.mat"
    scipy.io.savemat(path, {"x": cube, "mask": cube > 0.5, "bands": "text", "e": np.zeros((0, 3))})
    assert np.array_equal(read_cube(path, bands=12), cube) and read_wavelengths(path) is None
    write_v73(path, {"x": cube, "mask": cube > 0.5, "bands": np.array([[300, 400, 500]])})
    with h5py.File(path, "r+") as file:
        file["mask8"] = file["mask"][()].astype(np.uint8)
        file["mask8"].attrs["MATLAB_class"] = np.bytes_("logical")
        file["bands"].attrs["MATLAB_class"] = np.bytes_("char")
        file["table"] = np.zeros((2, 20, 24), np.uint32)
        file["table"].attrs["MATLAB_class"] = np.bytes_("table")
        file["x"].attrs["MATLAB_class"] = np.bytes_("single")
        file["wl"] = np.array([300, 500, 600], np.uint64)
        file["wl"].attrs["MATLAB_empty"] = 1
    assert np.array_equal(read_cube(path, bands=12), cube) and read_wavelengths(path) is None
    with h5py.File(path, "w") as file:
        file["x"] = cube
        file["alias"], file["nowhere"] = h5py.SoftLink("/x"), h5py.SoftLink("/y")
        file["ring"] = h5py.SoftLink("/")
    assert np.array_equal(read_cube(path, axes="hwc", bands=12), cube)
    scipy.io.savemat(path, {"x": cube.astype(complex)})
    refused("a.mat: there are no arrays of real numbers", read_cube, path)
    scipy.io.savemat(path, {"note": "a hypercube object"})
    refused("a.mat: there are no arrays of real numbers", read_cube, path)


@row
def hdf5_attributes(folder, tmp_path):
    counts = np.rint(cube_of() * 10000).astype(np.int16)
    counts[3, 5] = -9999
    hwc = ("--axes", "hwc")
    for name, attributes in (
        ("neon.h5", {"Scale_Factor": 10000.0, "Data_Ignore_Value": -9999.0}),
        ("cf.nc", {"scale_factor": np.float32([0.0001]), "_FillValue": np.int16([-9999])}),
    ):
        path = folder / name
        with h5py.File(path, "w") as file:
            file["Reflectance_Data"] = counts
            file["Reflectance_Data"].attrs.update(attributes)
            file["Metadata/Spectral_Data/Wavelength"] = NM
        cube = read_cube(path, axes="hwc")
        assert np.isnan(cube[3, 5]).all() and np.isnan(cube).sum() == BANDS
        np.testing.assert_allclose(cube[0], counts[0] / 10000, atol=1e-6)
        assert read_wavelengths(path) == NM
        refused("1 pixels hold no data .the value -9999.", stage, folder, tmp_path / "s", *hwc)
        index = stage(folder, tmp_path / name, *hwc, "--fill", 0)
        assert "divided by 10000" in str(index["splits"]["train"][0])
        refused("factor 10000 is applied", stage, folder, tmp_path / "s", *hwc, "--scale", 10000)
        for attribute, value in [
            ("scale_factor", np.linspace(0.1, 0.2, 12)),
            ("SCALE_FACTOR", "per band"),
            ("missing_value", h5py.Empty("f4")),
            ("add_offset", 1.0),
        ]:
            with h5py.File(path, "r+") as file:
                file["Reflectance_Data"].attrs.clear()
                file["Reflectance_Data"].attrs[attribute] = value
            words = "have an add_offset" if attribute == "add_offset" else "is not one number"
            refused(words, read_cube, path, axes="hwc")
        path.unlink()


def test_what_lies_beside_a_cube_in_hdf5_is_passed_over(folder):
    cube, path = cube_of(), folder / "a.h5"
    with h5py.File(path, "w") as file:
        file["in/x"] = cube[None]  # a batch of one
        file["in/back"], file["type"], file["none"] = file["/"], np.dtype("f4"), h5py.Empty("f4")
        file["valid"], file["text"] = cube > 0.5, "a leaf"
        file["pairs"] = np.zeros(3, [("nm", "f4"), ("name", "S3")])
        file["in/x"].attrs["wavelengths"] = NM
        file.attrs["bands"] = 400  # a count
    assert np.array_equal(read_cube(path, bands=12), cube) and read_wavelengths(path) == NM
    for unit, factor in [("Angstrom", 10), (b"nm", 1), (h5py.Empty("S1"), 1), ("um", 1e-3)]:
        with h5py.File(path, "w") as file:
            file["x"], file["wavelength"] = cube, np.multiply(NM, factor)
            file["wavelength"].attrs["units"] = unit
        assert read_wavelengths(path) == pytest.approx(NM)


def test_values_that_lie_in_other_files_are_refused(folder):
    cube, path = cube_of(), folder / "a.h5"
    (folder / "a.bin").write_bytes(cube.tobytes())
    layout = h5py.VirtualLayout(cube.shape, "f4")
    layout[:] = h5py.VirtualSource("gone.h5", "x", cube.shape)  # HDF5 would give the fill value
    for create, words in [
        (lambda file: file.create_virtual_dataset("x", layout, fillvalue=0.5), "in other files"),
        (
            lambda file: file.create_dataset("x", cube.shape, "f4", external=[("a.bin", 0, 9**6)]),
            "in other files",
        ),
        (lambda file: file.update(x=h5py.ExternalLink("b.h5", "/x")), "no array of three axes"),
    ]:
        with h5py.File(path, "w") as file:
            create(file)
            file["wavelength"] = NM
        refused(f"a.h5: .*{words}", read_cube, path, axes="hwc")


@row
def hdf5(folder, monkeypatch):
    cube = cube_of()
    for suffix, order in ((".h5", (0, 1, 2)), (".hdf5", (2, 0, 1))):
        path = folder / f"a{suffix}"
        with h5py.File(path, "w") as file:
            file["site/Reflectance/Cube"] = cube.transpose(order)
            file["site/Metadata/Wavelength"] = NM
        assert np.array_equal(read_cube(path, bands=12), cube) and read_wavelengths(path) == NM
    fcntl = pytest.importorskip("fcntl")
    with open(path) as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)  # or a file system has no locks
        assert read_wavelengths(path) == NM
    real = h5py.File
    for error, words in [
        (OSError(37, "Unable to open file (unable to lock file, errno = 37)"), "USE_FILE_LOCKING"),
        (OSError("can't open: required filter 'blosc' is not registered"), "gzip"),
        (PermissionError(13, "Permission denied"), "right to read"),
        (OSError(5, "Input/output error"), "disk"),
    ]:

        def fail(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(h5py, "File", fail)
        assert "replace" not in refused(f"a.hdf5: .*{words}", read_cube, path)
    monkeypatch.setattr(h5py, "File", real)
    path.write_bytes(path.read_bytes()[:2000])
    refused("a.hdf5: .*replace the file", read_cube, path)
    path.write_bytes(b"no HDF5")
    refused("a.hdf5: .*replace the file", read_cube, path)
    for start, kind in [(b"CDF\1", "netCDF-3"), (b"\x0e\x03\x13\x01", "HDF4")]:
        path.write_bytes(start + bytes(99))
        refused(f"a.hdf5: is {kind}; convert it", read_cube, path)


@row
def numpy(folder):
    cube, path = (cube_of() * 100).round(), folder / "a.npy"
    for kind in ("u1", ">i2", "f8", "f2"):
        np.save(path, cube.transpose(2, 0, 1).astype(kind))
        assert np.array_equal(read_cube(path, bands=12), cube)
    np.savez(folder / "a.npz", Cube=cube, second=cube, WAVELENGTHS=NM)
    assert np.array_equal(read_cube(folder / "a.npz", bands=12), cube)
    assert read_wavelengths(folder / "a.npz") == NM
    np.save(path, {"cube": cube}, allow_pickle=True)
    assert "replace" not in refused("a.npy: .*plain arrays", read_cube, path)
    np.save(path, cube.astype(complex))
    refused("a.npy: holds complex", read_cube, path)
    np.save(path, np.asfortranarray(cube)[None])
    assert np.array_equal(read_cube(path, bands=12), cube)
    np.save(path, cube.astype("f8") * 1e300)
    assert np.isinf(read_cube(path, bands=12)).all()  # and no warning is shown
    for array in (cube[:0], cube[0], np.stack([cube, cube])):
        np.save(path, array)
        refused("a.npy: the cube has shape .*three axes", read_cube, path)
    (folder / "a.npz").rename(path)
    refused("a.npy: .*magic", read_cube, path)
    beside = {"valid": cube > 50, "facts": np.array({"camera": 1}), "bands": ["b1", "b2"]}
    np.savez(folder / "a.npz", x=cube, wavelengths=[str(nm) for nm in NM], **beside)
    assert np.array_equal(read_cube(folder / "a.npz", bands=12), cube)
    assert read_wavelengths(folder / "a.npz") == NM
    np.savez(folder / "a.npz", facts=np.array({}))
    refused("a.npz: there are no arrays of real numbers", read_cube, folder / "a.npz")


@row
def tiff(folder, caplog):
    tifffile = pytest.importorskip("tifffile")
    cube, path = cube_of(), folder / "a.tif"
    planes = cube.transpose(2, 0, 1)
    for kind in ("u1", ">u2", "f4", "f8"):
        tifffile.imwrite(path, planes.astype(kind), photometric="minisblack", metadata=None)
        assert np.array_equal(read_cube(path, bands=12), cube.astype(kind))
    tifffile.imwrite(path, cube, photometric="minisblack", planarconfig="contig")
    assert np.array_equal(read_cube(path), cube)
    tifffile.imwrite(path, planes, photometric="minisblack", planarconfig="separate")
    assert np.array_equal(read_cube(path), cube)
    pages = [Image.fromarray((plane * 60000).astype(np.uint16)) for plane in planes]
    pages[0].save(path, save_all=True, append_images=pages[1:])
    assert np.array_equal(read_cube(path), (cube * 60000).astype(np.uint16))
    for array in (cube, planes):  # nothing says which axis is which
        tifffile.imwrite(path, array)
        assert np.array_equal(read_cube(path, bands=12), cube)
    with tifffile.TiffWriter(path) as file:
        file.write(np.zeros((4, 5, 3), np.uint8), photometric="rgb")  # a thumbnail
        file.write(planes, photometric="minisblack", planarconfig="separate")
        file.write(np.zeros((4, 5), np.uint8), photometric="minisblack", subfiletype=1)
    assert np.array_equal(read_cube(path), cube)
    _, facts = cube_files.read_stored(path)
    assert facts.remarks == ("images left out, as smaller than the cube: 1",)
    Image.fromarray(np.zeros((*SIZE, 3), np.uint8)[..., 0]).save(path)
    refused("a.tif: uint8 of axes YX", read_cube, path)
    tifffile.imwrite(path, planes, photometric="minisblack", compression="zlib")
    assert np.array_equal(read_cube(path, bands=12), cube)
    path.write_bytes(path.read_bytes()[:100])
    refused("a.tif: .*replace", read_cube, path)
    for lost, write in [  # of pages one after the other, the last would be left out
        (True, lambda: pages[0].save(path, save_all=True, append_images=pages[1:])),
        (True, lambda: tifffile.imwrite(path, planes, photometric="minisblack")),
        (False, lambda: tifffile.imwrite(path, cube, photometric=1, planarconfig=1, tile=(16, 16))),
        (False, lambda: tifffile.imwrite(path, cube, planarconfig="contig", photometric=1)),
    ]:
        write()
        path.write_bytes(path.read_bytes()[:-3000])
        refused("is cut, pages are missing" if lost else "replace the file", read_cube, path)
    assert not caplog.text
    if not importlib.util.find_spec("imagecodecs"):
        pages[0].save(path, save_all=True, append_images=pages[1:], compression="tiff_lzw")
        assert "replace" not in refused("a.tif: .*pip install imagecodecs", read_cube, path)


@row
def tiff_tags(folder, tmp_path, caplog):
    tifffile = pytest.importorskip("tifffile")
    cube, path = cube_of(), folder / "a.tif"
    counts = (cube * 10000).round().astype(np.int16)
    counts[3, 4] = -32768

    def write(items, array=counts, no_data="-32768"):
        xml = f"<GDALMetadata><Item name='AREA'>x</Item>{items}</GDALMetadata>"
        tags = [(42112, "s", 0, xml, True), (42113, "s", 0, no_data, True)]
        planar = {"photometric": "minisblack", "planarconfig": "contig"}
        tifffile.imwrite(path, array, metadata=None, extratags=tags, **planar)

    def named(text, name="DESCRIPTION", role=" role='description'"):
        items = [
            f"<Item name='{name}' sample='{i}'{role}>{text(nm)}</Item>" for i, nm in enumerate(NM)
        ]
        return "".join(items)

    for items in (
        named(lambda nm: f"{nm:g} nm"),
        named(lambda nm: f"Band 3 ({nm / 1000:g} um)"),
        named(lambda nm: f"{nm:g}", "wavelength", ""),
        named(lambda nm: f"{nm / 1000:g}", "CENTRAL_WAVELENGTH_UM", " domain='IMAGERY'"),
    ):
        write(items)
        assert read_wavelengths(path) == pytest.approx(NM)
    write(named(lambda nm: f"Band {NM.index(nm) + 1}"))
    assert read_wavelengths(path) is None
    write(named(lambda nm: f"{nm:g} nm") + named(lambda nm: 0.0001, "SCALE", " role='scale'"))
    refused("a.tif: 1 pixels hold no data", stage, folder, tmp_path / "s")
    refused("applied already; leave --scale out", stage, folder, tmp_path / "s", "--scale", 10000)
    stage(folder, tmp_path / "s", "--fill", 0)
    staged = staged_cube(tmp_path / "s")
    assert (staged[3, 4] == 0).all() and np.allclose(staged[0], counts[0] / 1e4)
    for role, value, words in [
        ("scale", lambda nm: nm, "bands of several scales, or offsets"),
        ("offset", lambda nm: 5, "bands of several scales, or offsets"),
        ("scale", lambda nm: "high", "its scale is high, not a number"),
        ("scale", lambda nm: 0, "a scale of 0; mend"),
    ]:
        write(named(value, "x", f" role='{role}'"))
        refused(f"a.tif: {words}", read_cube, path)
    write("<Item name='SCALE' sample='4' role='scale'>0.5</Item>")  # and of the others 1
    refused("a.tif: bands of several scales", read_cube, path)
    write("", (cube - 3.4028235e38 * (cube > 0.5)).astype("f4"), "-3.40282346638529e+38")
    assert np.array_equal(np.isnan(read_cube(path)), cube > 0.5)
    write("", cube, "none")
    refused("a.tif: its no-data value is none", read_cube, path)
    assert not caplog.text  # tifffile complains of numbers as long as that
    with tifffile.TiffWriter(path) as file:
        for plane, nm in zip(cube.transpose(2, 0, 1), NM, strict=True):
            file.write(plane, description=f"{nm:g} nm", metadata=None, contiguous=False)
    assert read_wavelengths(path) == NM and np.array_equal(read_cube(path), cube)


@row
def cave(folder):
    scene = folder / "toy.1_ms"
    scene.mkdir()
    planes = (cube_of() * 65535).astype(np.uint16)
    for band in range(12):
        Image.fromarray(planes[..., band]).save(scene / f"toy_ms_{band + 1:02d}.png")
        (scene / f"._toy_ms_{band + 1:02d}.png").write_bytes(b"macOS")
    assert np.array_equal(read_cube(scene), planes / np.float32(65535))
    assert [found.name for found in dataset_setup.find_folder_scenes(folder)] == ["toy.1"]
    last, grey = scene / "toy_ms_12.png", Image.fromarray(np.zeros(SIZE, np.uint8))
    for image, words in [
        (grey.convert("P"), "a P image; give grey"),
        (grey.convert("1"), "a 1 image; give grey"),
        (grey.crop((0, 0, 5, 6)), "6, 5. pixels, not .20, 24"),
    ]:
        image.save(last)
        refused(f"toy_ms_12.png: .*{words}", read_cube, scene)


# --- values, bands and names


@row
def a_little_outside(folder, tmp_path, capsys):
    cube = cube_of()
    cube[0, 0, :3] = 1.03, -0.004, 1.01
    np.save(folder / "a.npy", cube)
    flags = ("--axes", "hwc", "--wavelengths", 450, 670)
    message = refused("a.npy: .*--clip", stage, folder, tmp_path / "s", *flags)
    assert "--scale" not in message
    index = stage(folder, tmp_path / "s", *flags, "--clip")
    assert np.array_equal(staged_cube(tmp_path / "s"), cube.clip(0, 1))
    clipped = index["splits"]["train"][0]["clipped"]
    assert clipped == {"share": 3 / cube.size, "largest_excess": pytest.approx(0.03)}
    assert "--clip" in capsys.readouterr().out
    for array, words in [
        (cube.clip(0.01) * 4095, "--scale"),
        (cube - 2, "--no-data"),
        (cube - 9999, "-9999"),
    ]:
        np.save(folder / "a.npy", array)
        refused(words, stage, folder, tmp_path / "t", *flags, "--clip")


@row
def no_data_of_arrays(folder, tmp_path):
    cube = cube_of()
    cube[0, :5] = -9999
    cube[1, 0, 0], cube[1, 1, 0] = np.nan, np.inf
    np.save(folder / "a.npy", cube)
    flags = ("--axes", "hwc", "--wavelengths", 450, 670)
    refused("2 values are NaN or infinite.*--fill", stage, folder, tmp_path / "s", *flags)
    refused("from -9999 .*--no-data=VALUE", stage, folder, tmp_path / "s", *flags, "--fill", 0)
    flags += ("--no-data", -9999)
    refused("6 pixels hold no data", stage, folder, tmp_path / "t", *flags)
    index = stage(folder, tmp_path / "t", *flags, "--fill", 0)
    assert index["splits"]["train"][0]["filled"]["pixels"] == 7
    assert index["settings"]["no_data"] == -9999
    counts = (cube * 10000).clip(1, 9000)
    counts[0, :5] = -9999  # -0.9999, once it is scaled, is no reflectance
    np.save(folder / "a.npy", counts.astype(np.int16))
    refused("--no-data", stage, folder, tmp_path / "u", *flags[:-2], "--scale", 10000, "--clip")
    stage(folder, tmp_path / "u", *flags, "--scale", 10000, "--fill", 0)
    assert (staged_cube(tmp_path / "t")[0, :5] == 0).all()


@row
def counts(folder, tmp_path):
    rng = np.random.default_rng(0)
    cube, gain = cube_of(), rng.uniform(2000, 3000, (1, SIZE[1], BANDS))
    offset = rng.uniform(90, 110, gain.shape)
    noise = np.array([-3, 3])[:, None, None]
    write_envi(folder / "a.hdr", cube * gain + offset, kind=12)
    write_envi(folder / "W.hdr", gain + offset + noise, kind=5, interleave="bil")
    np.save(tmp_path / "dark.npy", offset[0])
    references = ("--white", folder / "W.hdr", "--dark", tmp_path / "dark.npy")
    index = stage(folder, tmp_path / "s", *references)
    assert [entry["name"] for entry in index["splits"]["train"]] == ["a"]
    assert np.allclose(staged_cube(tmp_path / "s"), cube, atol=1e-3)
    np.save(tmp_path / "dark.npy", offset[0] * 0)
    stage(folder, tmp_path / "s", *references)
    changed = staged_cube(tmp_path / "s")
    assert np.allclose(changed, (cube * gain + offset) / (gain + offset), atol=1e-3)
    offset[0, 7, 2] = 1e6  # a dead pixel
    np.save(tmp_path / "dark.npy", offset[0])
    refused("a.hdr: 20 values are NaN", stage, folder, tmp_path / "t", *references)
    np.save(tmp_path / "dark.npy", offset[0, :5])
    refused("dark.npy: 5 columns of 12 bands", stage, folder, tmp_path / "t", *references)
    np.save(tmp_path / "dark.npy", offset[0] + 5000)
    refused("--white .*not brighter", stage, folder, tmp_path / "t", *references)
    refused("--dark x: give --white", stage, folder, tmp_path / "t", "--dark", "x")


@row
def choice_of_bands(folder, tmp_path):
    cube = cube_of()
    write_envi(folder / "a.hdr", cube, bbl="{" + ", ".join(["1"] * 4 + ["0"] + ["1"] * 7) + "}")
    for number, (choice, kept) in enumerate(
        [("1-3,12", [0, 1, 2, 11]), ("490-550nm", [2, 3, 5]), ("451", [0]), ("4:6 8", [3, 5, 7])]
    ):
        index = stage(folder, tmp_path / str(number), "--bands", *choice.split())
        assert index["wavelengths"] == [NM[band] for band in kept]
        assert np.array_equal(staged_cube(tmp_path / str(number)), cube[..., kept])
    for choice in ("800-900nm", "13", "0", "1-3,900nm", "3-11.5"):
        refused(
            "--bands .*: none of bands 1 to 12, 450..670 nm",
            stage,
            folder,
            tmp_path / "t",
            "--bands",
            choice,
        )
    refused("marks bad", stage, folder, tmp_path / "t", "--bands", "5")
    refused("--bands red", stage, folder, tmp_path / "t", "--bands", "red")


@row
def given_wavelengths(folder, tmp_path):
    uneven = [453.5, 457.5, 462, *np.linspace(470, 640, 8).round(1), 648]
    np.savez(folder / "a.npz", cube=cube_of())
    (tmp_path / "nm.txt").write_text(
        "\ufeff# centres, nm\n" + ",\n".join(map(str, uneven)) + "\n", "utf-8"
    )
    for number, words in enumerate([uneven, [tmp_path / "nm.txt"]]):
        flags = ("--axes", "hwc", "--wavelengths", *words)
        assert stage(folder, tmp_path / str(number), *flags)["wavelengths"] == uneven
    np.savez(folder / "b.npz", cube=cube_of(), bands=uneven[:5])
    refused("b.npz: 5 wavelengths of 12 bands", stage, folder, tmp_path / "t", *flags)
    np.savez(folder / "b.npz", cube=cube_of(), bands=NM)
    refused("b.npz: 450..670 nm, not 453.5..648", stage, folder, tmp_path / "t", *flags)
    refused("b.npz: 450..670", stage, folder, tmp_path / "t", *flags)
    (folder / "b.npz").unlink()
    np.savez(folder / "a.npz", cube=cube_of(), bands=400)  # a count
    assert stage(folder, tmp_path / "u", *flags)["wavelengths"] == uneven
    np.savez(folder / "a.npz", cube=cube_of(), bands=NM[:5])
    refused("a.npz: 5 wavelengths of 12 bands", stage, folder, tmp_path / "t", *flags[:2])
    for words, message in [
        (uneven[:-1], "11 numbers for 12 bands"),
        ([0.45, 0.65], "in nm"),
        (["450", "x"], "numbers in nm"),
        (["none.txt"], "none.txt: no such file"),
    ]:
        flags = ("--axes", "hwc", "--wavelengths", *words)
        refused(message, stage, folder, tmp_path / "t", *flags)


@row
def names_of_photos(folder):
    photos = ("leaf.PNG", "Ant_rgb.jpg", "bee_clean.png", "cow_RealWorld.jpg", "sub/dog.bmp")
    (folder / "sub").mkdir()
    for photo in photos:
        name = re.split(r"[_.]", photo.split("/")[-1])[0]
        Image.new("RGB", SIZE[::-1]).save(folder / photo)
        (folder / f"{name}.mat").touch()
    scenes = {scene.name: scene.rgb_path for scene in dataset_setup.find_folder_scenes(folder)}
    assert scenes.keys() == {"leaf", "Ant", "bee", "cow", "dog"} and None not in scenes.values()
    (folder / "ant_rgb.mat").touch()  # a scene of its own, and the photo is its
    scenes = {scene.name: scene.rgb_path for scene in dataset_setup.find_folder_scenes(folder)}
    assert scenes["ant_rgb"].name == "Ant_rgb.jpg" and scenes["Ant"] is None
    Image.new("RGB", SIZE[::-1]).save(folder / "bee_RealWorld.jpg")
    refused("bee.* are both scene bee", dataset_setup.find_folder_scenes, folder)
    for place in ("Train_Spec", "Train_RGB"):
        (folder / place).mkdir()
    (folder / "bee.mat").rename(folder / "Train_Spec" / "bee.mat")
    (folder / "bee_clean.png").rename(folder / "Train_RGB" / "bee_clean.png")
    (scene,) = dataset_setup.find_scenes(folder)["train"]
    assert scene.rgb_path.name == "bee_clean.png"


@row
def turned_photos(folder):
    exif = Image.Exif()
    for orientation in (0, 1, 6, 3):
        exif[0x0112] = orientation
        Image.new("RGB", SIZE[::-1]).save(folder / "a.jpg", exif=exif)
        if orientation < 2:
            assert cube_files.read_rgb(folder / "a.jpg").shape == (*SIZE, 3)
        else:
            refused("a.jpg: its EXIF turns it", cube_files.read_rgb, folder / "a.jpg")


@row
def system_files(folder):
    for name in ("Train_Spec", "Train_RGB", "__MACOSX"):
        (folder / name).mkdir()
    np.save(folder / "a.npy", cube_of())
    for place in (folder, folder / "Train_Spec", folder / "Train_RGB", folder / "__MACOSX"):
        for name in ("._a.npy", "._a.png", "Thumbs.db", "desktop.ini", ".DS_Store", "._b.mat"):
            (place / name).write_bytes(b"a system's own")
    (folder / "__MACOSX" / "a.png").write_bytes(b"a system's own")
    (scene,) = dataset_setup.find_folder_scenes(folder)
    assert (scene.name, scene.rgb_path) == ("a", None)
    Image.new("RGB", SIZE).save(folder / "photo.png")
    assert sharp_inference.find_inputs([str(folder)]) == [folder / "photo.png"]
    assert dataset_setup.find_scenes(folder) == {"train": [], "val": [], "test": []}


@row
def links(folder, tmp_path):
    real = tmp_path / "store" / "beads_ms"
    (real / "beads_ms").mkdir(parents=True)
    for band in range(12):
        plane = (cube_of()[..., band] * 65535).astype(np.uint16)
        Image.fromarray(plane).save(real / "beads_ms" / f"beads_ms_{band + 1:02d}.png")
    Image.new("RGB", SIZE[::-1]).save(real / "beads_ms" / "beads_RGB.bmp")
    (folder / "beads_ms").symlink_to(real)
    (folder / "again").symlink_to(folder)  # a ring
    (folder / "photos").mkdir()
    (folder / "photos" / "more").symlink_to(real / "beads_ms")  # a second way to the photo
    for name in ("beads_ms", "other_ms"):
        (folder / "beads_ms").rename(folder / name)
        (scene,) = dataset_setup.find_folder_scenes(folder)
        assert scene.name + "_ms" == name and scene.rgb_path.name == "beads_RGB.bmp"
        assert read_cube(scene.cube_path).shape == (*SIZE, 12)
        (folder / name).rename(folder / "beads_ms")


# --- written


@row
def written(tmp_path):
    cube = cube_of().transpose(2, 0, 1).copy()
    for kind, suffix in cube_files.WRITTEN.items():
        cube_files.write_cube(tmp_path / f"a{suffix}", cube, NM, kind)
        values = read_cube(tmp_path / f"a{suffix}", bands=12)
        assert np.array_equal(values, cube.transpose(1, 2, 0))
        assert read_wavelengths(tmp_path / f"a{suffix}") == (None if kind == "npy" else NM)
    out = tmp_path / "a.tiff"
    assert sharp_inference.output_paths([out], out, None) == ([tmp_path / "a.tif"], "tiff")
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert np.array_equal(file.asarray(), cube)
        metadata = file.pages[0].tags[42112].value
    assert '<Item name="DESCRIPTION" sample="1" role="description">470 nm</Item>' in metadata


def documented_rows():
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| ([a-z0-9. -]+?) \|", text, re.MULTILINE)
    return [name for name in names if name != "row"]


def test_the_table_and_the_tests_have_the_same_rows():
    named = [name.replace(".", " ") for name in documented_rows()]
    assert sorted(named) == sorted(ROWS)


@pytest.mark.parametrize("name", documented_rows())
def test_row(name, tmp_path, folder, request):
    test = ROWS[name.replace(".", " ")]
    wanted = test.__code__.co_varnames[: test.__code__.co_argcount]
    test(**{argument: request.getfixturevalue(argument) for argument in wanted})
