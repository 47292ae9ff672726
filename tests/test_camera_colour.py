"""Colour and camera: tables, cameras, the rendering recipe and the picture to look at."""

import io

import colour
import numpy as np
import pytest
from PIL import Image

from camera_colour import (
    CAMERAS,
    camera_response,
    cube_to_srgb,
    linear_light,
    ordinary_photo,
    render_rgb,
)
from common_utils_v32 import UserError

NM = np.arange(400.0, 701.0, 10.0)


def flat_cube(value, side=32):
    return np.full((side, side, 31), value, np.float32)


@pytest.mark.parametrize(
    "observer, peaks", [("cie1931", [600, 555, 445]), ("cie1964", [595, 555, 445])]
)
def test_an_observer_peaks_where_the_cie_says(observer, peaks):
    nm = np.arange(380.0, 781.0, 5.0)
    assert nm[camera_response(observer, nm).argmax(axis=0)].tolist() == peaks


def test_a_measured_response_is_the_table_of_its_camera():
    sensitivities = colour.MSDS_CAMERA_SENSITIVITIES["Nikon 5100 (NPL)"]
    nm = np.array(sensitivities.wavelengths)
    expected = sensitivities.values / sensitivities.values.sum(axis=0)
    inner = slice(1, -1)  # the first and last band are as wide as the others, and 0
    np.testing.assert_allclose(camera_response("nikon5100", nm)[inner], expected[inner], rtol=1e-9)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize(
    "nm", [NM, np.linspace(420, 690, 28), np.linspace(400, 1000, 204), NM[::-1]]
)
def test_every_camera_sees_a_perfect_white_as_one_and_blue_green_red_in_order(camera, nm):
    response = camera_response(camera, nm)
    assert response.shape == (len(nm), 3) and ((response >= 0).all() or camera == "srgb")
    assert np.ones(len(nm)) @ response == pytest.approx([1, 1, 1])
    centre = (response * np.asarray(nm)[:, None]).sum(axis=0)
    assert 430 < centre[2] < 490 < centre[1] < 575 and centre[1] + 10 < centre[0] < 650


def test_the_two_analytic_cameras_differ_in_hue():
    first, second = camera_response("analytic", NM), camera_response("analytic2", NM)
    assert np.abs(first - second).sum(axis=0).min() > 0.15


def test_a_camera_from_csv_is_interpolated_with_or_without_header(tmp_path):
    rows = "400,0,0,2\n500,0,2,1\n700,2,0,0\n"
    (tmp_path / "plain.csv").write_text(rows)
    (tmp_path / "header.csv").write_text("nm,r,g,b\n" + rows)
    plain, header = (
        camera_response(str(tmp_path / f"{name}.csv"), NM) for name in ("plain", "header")
    )
    assert np.array_equal(plain, header)
    assert plain[5, 2] / plain[0, 2] == pytest.approx(0.75)  # halfway from 2 to 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("1,2,3\n4,5,6\n", "four numbers"),
        ("400,1,1,x\n500,1,1,1\n", "four numbers"),
        ("400,1,1,1\n500,1\n", "nm,r,g,b"),
        ("800,1,1,1\n900,1,1,1\n", "sees nothing"),
    ],
)
def test_a_bad_camera_file_is_an_error_that_names_it(tmp_path, text, message):
    path = tmp_path / "camera.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        camera_response(str(path), NM)
    assert str(path) in str(error.value)


def test_an_unknown_camera_is_an_error_that_names_the_choices():
    with pytest.raises(UserError, match="analytic2.*nikon5100.*cie1931.*cie1964.*CSV"):
        camera_response("leica", NM)


def test_a_fixed_exposure_keeps_brightness_and_the_automatic_one_sets_the_mean_to_018():
    response, rng = camera_response("analytic", NM), np.random.default_rng(0)
    for value in (0.1, 0.3):
        fixed, automatic = (
            render_rgb(flat_cube(value), response, rng=rng, exposure=e)[0].mean() / 255
            for e in (1.5, None)
        )
        assert fixed == pytest.approx(1.5 * value, rel=0.02) and automatic == pytest.approx(
            0.18, rel=0.03
        )


def test_noise_is_poisson_in_photo_electrons_seeded_and_can_be_turned_off():
    response, cube = camera_response("analytic", NM), flat_cube(0.4, 128)

    def render(seed=0, **options):
        return render_rgb(
            cube,
            response,
            rng=np.random.default_rng(seed),
            exposure=1.0,
            jpeg_quality=100,
            **options,
        )[0]

    luma = np.array([0.299, 0.587, 0.114])  # the part of a JPEG that is not subsampled
    for options, electrons in (({}, 750), ({"electrons": 3000}, 3000)):
        expected = np.sqrt(0.4 / electrons) * np.linalg.norm(luma)
        assert (render(**options) @ luma / 255).std() == pytest.approx(expected, rel=0.1)
    assert render(electrons=0).std() < 1
    assert np.array_equal(render(), render()) and not np.array_equal(render(), render(seed=1))


def test_overexposed_pixels_clip_and_the_bytes_are_the_jpeg_of_the_picture():
    rgb, jpeg = render_rgb(
        flat_cube(0.9), camera_response("analytic", NM), rng=np.random.default_rng(0), exposure=3.0
    )
    assert rgb.dtype == np.uint8 and rgb.min() > 250
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.format == "JPEG" and np.array_equal(np.asarray(image), rgb)


def test_jpeg_quality_changes_the_size():
    cube = np.random.default_rng(0).random((64, 64, 31), dtype=np.float32)
    response = camera_response("analytic", NM)
    low, high = (
        len(render_rgb(cube, response, rng=np.random.default_rng(0), jpeg_quality=q)[1])
        for q in (30, 90)
    )
    assert low < high


def test_the_picture_of_a_flat_spectrum_is_grey_with_srgb_gamma_and_of_one_band_has_its_hue():
    assert cube_to_srgb(flat_cube(1.0), NM)[0, 0].tolist() == [255, 255, 255]
    grey = cube_to_srgb(flat_cube(0.18), NM)[0, 0].astype(int)
    assert np.abs(grey - 118).max() <= 2  # 18 % grey in sRGB
    for nm, channel in ((450, 2), (540, 1), (640, 0)):
        assert cube_to_srgb((np.abs(NM - nm) < 15) * flat_cube(1.0), NM)[0, 0].argmax() == channel


@pytest.mark.filterwarnings("ignore:Aligning")
def test_the_picture_of_a_colour_chart_is_what_colour_science_computes_in_daylight():
    daylight = colour.SDS_ILLUMINANTS["D65"]
    for spectrum in colour.SDS_COLOURCHECKERS["ISO 17321-1"].values():
        xyz = colour.sd_to_XYZ(spectrum, illuminant=daylight) / 100
        expected = 255 * np.clip(colour.XYZ_to_sRGB(xyz), 0, 1)
        patch = np.interp(NM, spectrum.wavelengths, spectrum.values)[None, None]
        assert np.abs(cube_to_srgb(patch, NM)[0, 0] - expected).max() < 2


def test_a_table_is_looked_up_without_a_word(capfd):
    camera_response("nikon5100", NM)
    cube_to_srgb(flat_cube(0.5), NM)
    assert capfd.readouterr() == ("", "")


# --- ordinary photos


def test_an_ordinary_photo_is_the_cubes_srgb_picture_up_to_noise_and_white_balance():
    nm = np.arange(400, 701, 10)
    rng = np.random.default_rng(0)
    cube = np.kron(rng.uniform(0.1, 0.8, (6, 6, 31)).mean(2, keepdims=True), np.ones((16, 16, 31)))
    response = camera_response("srgb", nm)
    photo, jpeg = ordinary_photo(cube, response, rng=rng)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(jpeg))), photo)
    error = np.abs(photo.astype(int) - cube_to_srgb(cube, nm))
    assert error.mean() < 6 and error.any()
    grey = photo.reshape(-1, 3).mean(0)
    assert np.ptp(grey) > 0.5  # the white balance is off a little


def test_srgb_values_become_linear_light_at_both_depths():
    values = np.array([[0, 10, 128, 255]])
    share = values / 255
    want = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    found = linear_light(values.astype(np.uint8))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_allclose(linear_light((values * 257).astype(np.uint16)), want, atol=1e-6)


def test_the_order_of_the_bands_does_not_matter():
    nm, order = np.linspace(400, 700, 31), np.random.default_rng(0).permutation(31)
    response = camera_response("cie1931", nm)
    assert np.allclose(camera_response("cie1931", nm[order]), response[order])
