"""Reading scans: every voxel as an independent reader (SimpleITK) has it, in any order, direction and encoding."""

import os
import shutil
from pathlib import Path

import gdcm
import nibabel
import numpy as np
import numpy.typing as npt
import pytest
import SimpleITK
from made_scans import AXIAL, INTERCEPT, chest, write_series
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian, RLELossless

from fl_client.tasks import dicom
from fl_client.tasks.dicom import Decoder, read_header
from fl_client.tasks.errors import UnreadableExample
from fl_client.tasks.series import Grid, Series, Volume, arrange, open_nifti
from fl_client.tasks.volumes import Box, BoxCache

BOX = Box((16, 20, 24), (3.0, 2.5, 2.5), (-1000, 400))


def series_of(folder: Path) -> Series:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return arrange(paths, [read_header(path, pixels=True) for path in paths])


def read(folder: Path) -> Volume:
    with Decoder() as decoder:
        return series_of(folder).read(decoder)


def independent(folder: Path) -> SimpleITK.Image:
    reader = SimpleITK.ImageSeriesReader()
    (series,) = reader.GetGDCMSeriesIDs(str(folder))
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder), series))
    return reader.Execute()


def require_same_voxels(ours: Volume, theirs: SimpleITK.Image) -> None:
    """Equal values at equal places; the other reader may count slices from the other end."""
    array = SimpleITK.GetArrayFromImage(theirs)
    first = ours.grid.affine @ [0, 0, 0, 1]
    k, j, i = (round(x) for x in reversed(theirs.TransformPhysicalPointToContinuousIndex(first[:3])))
    assert (j, i) == (0, 0)
    assert k in (0, len(array) - 1)
    np.testing.assert_array_equal(ours.values, array if k == 0 else array[::-1])
    for index in ((0, 0, 0), (len(array) - 1, 3, 5)):
        place = ours.grid.affine @ [*index, 1]
        other = index if k == 0 else (len(array) - 1 - index[0], *index[1:])
        np.testing.assert_allclose(place[:3], theirs.TransformIndexToPhysicalPoint(other[::-1]), atol=1e-3)


OBLIQUE = (0.9848077530, 0.1736481777, 0.0, -0.1699301, 0.9637219, 0.2058905)


@pytest.mark.parametrize("orientation", [AXIAL, (-1.0, 0, 0, 0, -1.0, 0), (0, 1.0, 0, 0, 0, -1.0), OBLIQUE])
def test_made_series_are_read_as_an_independent_reader_reads_them(
    tmp_path: Path, orientation: tuple[float, ...]
) -> None:
    write_series(tmp_path / "scan", orientation=orientation)
    require_same_voxels(read(tmp_path / "scan"), independent(tmp_path / "scan"))


@pytest.mark.realdata
def test_a_real_scan_is_read_as_an_independent_reader_reads_it(tmp_path: Path) -> None:
    given = os.environ.get("MEDHIVE_TEST_DATA")
    if not given:
        pytest.skip("MEDHIVE_TEST_DATA names no folder with real data")
    (folder,) = (Path(given) / "ct_dicom").iterdir()
    ours = read(folder)
    require_same_voxels(ours, independent(folder))
    assert ours.grid.shape == (48, 512, 512)
    assert ours.grid.spacing_mm[0] == pytest.approx(1.0)
    require_same_resampling(ours, independent(folder), Box((40, 64, 64), (1.0, 5.0, 5.0), (-1000, 400)), tolerance=1)


def test_names_and_order_of_files_do_not_matter(tmp_path: Path) -> None:
    paths = write_series(tmp_path / "one")
    before = series_of(tmp_path / "one")
    (tmp_path / "other" / "deep").mkdir(parents=True)
    for number, path in enumerate(paths):
        shutil.copy(path, tmp_path / "other" / ("deep" if number % 2 else ".") / f"{99 - number}.whatever")
    after = series_of(tmp_path / "other")
    assert after.digest == before.digest
    np.testing.assert_array_equal(read(tmp_path / "other").values, chest())


def require_same_resampling(ours: Volume, theirs: SimpleITK.Image, box: Box, tolerance: float) -> None:
    cut = box.cut(ours, ours.grid.centre_mm)
    grid = SimpleITK.Image([int(n) for n in reversed(box.shape)], SimpleITK.sitkFloat32)
    spacing = np.array(box.spacing_mm[::-1])
    grid.SetSpacing(spacing.tolist())
    grid.SetOrigin((ours.grid.centre_mm - (np.array(box.shape[::-1]) - 1) / 2 * spacing).tolist())
    low, high = box.window_hu
    found = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(theirs, grid, SimpleITK.Transform(), SimpleITK.sitkLinear, low, SimpleITK.sitkFloat32)
    )
    expected = (np.clip(found, low, high) - low) * (255 / (high - low))
    # At the rim the two differ in whether half a voxel beyond the last one still counts.
    inner = (slice(1, -1),) * 3
    np.testing.assert_allclose(cut[inner], expected[inner], atol=tolerance)


@pytest.mark.parametrize("orientation", [AXIAL, OBLIQUE])
def test_resampling_is_that_of_an_independent_library(tmp_path: Path, orientation: tuple[float, ...]) -> None:
    write_series(tmp_path / "scan", orientation=orientation)
    inside = Box((6, 10, 12), (2.2, 2.1, 1.9), (-1000, 400))
    require_same_resampling(read(tmp_path / "scan"), independent(tmp_path / "scan"), inside, tolerance=0.6)


def ball(shape: tuple[int, int, int], affine: npt.NDArray[np.float64], radius_mm: float) -> npt.NDArray[np.int16]:
    """A ball at the patient's origin, in air, on any grid."""
    index = np.stack([*np.mgrid[tuple(slice(0, n) for n in shape)], np.ones(shape)], axis=-1)
    distance = np.linalg.norm((index @ affine.T)[..., :3], axis=-1)
    return np.where(distance < radius_mm, 40, -1000).astype(np.int16)


def test_a_tilted_gantry_is_corrected(tmp_path: Path) -> None:
    angle = np.radians(20)
    down = np.array([0, np.cos(angle), np.sin(angle)])
    step, origin = np.array([0, 0, 2.0]), np.array([-30, -30 * down[1], -30 * down[2] - 30])
    affine = np.eye(4)
    affine[:3] = np.stack([step, down * 1.5, [1.5, 0, 0], origin], axis=1)
    values = ball((40, 40, 40), affine, 15)
    write_series(
        tmp_path / "scan", values=values, spacing_mm=(2, 1.5, 1.5), origin_mm=origin, step_mm=step,
        orientation=(1, 0, 0, *down),
    )  # fmt: skip
    volume = read(tmp_path / "scan")
    assert volume.grid.tilt_deg == pytest.approx(20, abs=0.01)
    box = Box((24, 24, 24), (2, 2, 2), (-1000, 400))

    place = (np.stack(np.mgrid[:24, :24, :24]) - 11.5) * 2
    truth = np.linalg.norm(place, axis=0) < 15

    def agreement(volume: Volume) -> float:
        found = box.cut(volume, (0, 0, 0)) > 100
        return 2 * np.count_nonzero(found & truth) / (np.count_nonzero(found) + np.count_nonzero(truth))

    assert agreement(volume) > 0.94
    # Read as if the slices lay straight above each other, the ball is a slanted one in another place.
    straight = affine.copy()
    straight[:3, 0] = np.cross([1, 0, 0], down) * 2
    assert agreement(Volume(values, Grid((40, 40, 40), straight))) < 0.85


LOSSLESS = {
    "JPEG": gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    "JPEG 2000": gdcm.TransferSyntax.JPEG2000Lossless,
    "JPEG-LS": gdcm.TransferSyntax.JPEGLSLossless,
}


def recode(path: Path, syntax: int) -> None:
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    assert reader.Read()
    change = gdcm.ImageChangeTransferSyntax()
    change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer = gdcm.ImageWriter()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()


@pytest.mark.parametrize("name", [*LOSSLESS, "RLE", "implicit", "big-endian"])
def test_every_encoding_is_decoded_to_the_same_voxels(tmp_path: Path, name: str) -> None:
    values = chest((3, 32, 40))

    def change(dataset: Dataset, _number: int) -> None:
        if name == "RLE":
            dataset.compress(RLELossless, generate_instance_uid=False)
        elif name == "implicit":
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        elif name == "big-endian":
            dataset.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
            dataset.PixelData = np.frombuffer(dataset.PixelData, "<u2").astype(">u2").tobytes()

    for path in write_series(tmp_path / "scan", values=values, change=change):
        if name in LOSSLESS:
            recode(path, LOSSLESS[name])
        assert read_header(path).unfit == ""
    written = dcmread(path).file_meta.TransferSyntaxUID
    assert written.is_compressed == (name in (*LOSSLESS, "RLE"))
    np.testing.assert_array_equal(read(tmp_path / "scan").values, values)


def test_lossy_jpeg_is_decoded_too(tmp_path: Path) -> None:
    eight = (chest((3, 32, 40)).clip(-1000, 500) + 1000) // 8
    for path in write_series(tmp_path / "scan", values=eight.astype(np.int16)):
        dataset = dcmread(path)
        dataset.BitsAllocated = dataset.BitsStored = 8
        dataset.HighBit, dataset.RescaleIntercept, dataset.RescaleSlope = 7, -1000, 8
        pixels = (np.frombuffer(dataset.PixelData, "<u2").astype(int) + INTERCEPT).astype(np.uint8)
        dataset.PixelData = pixels.tobytes()
        dataset.save_as(path, enforce_file_format=True)
        recode(path, gdcm.TransferSyntax.JPEGBaselineProcess1)
    assert np.abs(read(tmp_path / "scan").values - (eight * 8 - 1000)).mean() < 60


def test_a_decoder_that_dies_or_hangs_costs_one_slice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = write_series(tmp_path / "scan", values=chest((3, 32, 40)))
    for path in paths:
        recode(path, LOSSLESS["JPEG-LS"])
    header = read_header(paths[0], pixels=True)
    with Decoder() as decoder:
        decoder.hounsfield(paths[0], header)
        assert decoder._process is not None
        first = decoder._process
        first.kill()
        first.wait()
        with pytest.raises(UnreadableExample) as refused:
            decoder.hounsfield(paths[0], header)
        assert refused.value.reason == "corrupt"
        np.testing.assert_array_equal(decoder.hounsfield(paths[1], header), chest((3, 32, 40))[1])
        monkeypatch.setattr(dicom, "DECODER_PATIENCE_S", 0.0)
        with pytest.raises(UnreadableExample):
            decoder.hounsfield(paths[0], header)
        assert decoder._process is None


@pytest.mark.parametrize("packed", [False, True])
def test_nifti_is_the_same_scan(tmp_path: Path, packed: bool) -> None:
    write_series(tmp_path / "scan")
    theirs = independent(tmp_path / "scan")
    path = tmp_path / ("scan.nii.gz" if packed else "scan.nii")
    SimpleITK.WriteImage(theirs, str(path))
    series = open_nifti(path)
    with Decoder() as decoder:
        ours = series.read(decoder)
        cut = BOX.cut(ours, ours.grid.centre_mm)
    np.testing.assert_array_equal(ours.values, SimpleITK.GetArrayFromImage(theirs).transpose(2, 1, 0))
    dicom_volume = read(tmp_path / "scan")
    np.testing.assert_allclose(cut, BOX.cut(dicom_volume, dicom_volume.grid.centre_mm), atol=1)


def test_a_nifti_header_may_say_what_it_likes(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(chest(), np.eye(4))
    nibabel.save(image, tmp_path / "good.nii")
    good = (tmp_path / "good.nii").read_bytes()

    def reason(content: bytes, name: str = "bad.nii") -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableExample) as refused, Decoder() as decoder:
            open_nifti(tmp_path / name).read(decoder)
        return refused.value.reason

    huge = good[:42] + (32767).to_bytes(2, "little") * 3 + good[48:]
    assert reason(huge) == "too-large"
    assert reason(good[:108] + np.float32(1e30).tobytes() + good[112:]) == "too-large"
    assert reason(good[:200]) == "truncated"
    assert reason(good[: len(good) // 2]) in ("truncated", "corrupt", "unreadable")
    assert reason(good, "good.nii.gz") in ("corrupt", "unreadable")
    assert reason(b"x" * 500) == "unsupported-encoding"


def test_finer_scans_are_averaged_while_they_are_read(tmp_path: Path) -> None:
    values = chest((12, 32, 40))
    write_series(tmp_path / "scan", values=values, spacing_mm=(1.0, 1.0, 1.0))
    with Decoder() as decoder:
        small = series_of(tmp_path / "scan").read(decoder, (3.0, 2.0, 2.0))
    assert small.grid.shape == (4, 16, 20)
    expected = values.reshape(4, 3, 16, 2, 20, 2).mean(axis=(1, 3, 5))
    np.testing.assert_allclose(small.values, expected, atol=0.51)
    np.testing.assert_allclose(small.grid.centre_mm, series_of(tmp_path / "scan").grid.centre_mm)


def test_kept_boxes_are_bounded_whole_and_keyed_by_all_that_matters(tmp_path: Path) -> None:
    shape = (10, 10, 10)
    cache = BoxCache(tmp_path, limit_bytes=5_100)
    boxes = {f"{n:064x}": np.full(shape, n, np.uint8) for n in range(8)}
    for number, (key, box) in enumerate(boxes.items()):
        cache.put(key, box)
        os.utime(next(tmp_path.glob(f"*/{key}.box")), (number, number))
    kept = [key for key in boxes if cache.get(key, shape) is not None]
    assert kept == list(boxes)[-len(kept) :]
    assert 3 <= len(kept) <= 5
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.box")) <= 5_100
    np.testing.assert_array_equal(BoxCache(tmp_path).get(kept[-1], shape), boxes[kept[-1]])
    # What a crash may leave: half a file, and one whose bytes never reached the disk.
    path = next(tmp_path.glob(f"*/{kept[-1]}.box"))
    path.write_bytes(path.read_bytes()[:-10])
    assert cache.get(kept[-1], shape) is None
    assert not path.exists()
    other = next(tmp_path.glob(f"*/{kept[-2]}.box"))
    other.write_bytes(bytes(other.stat().st_size - 1) + b"\1")
    assert cache.get(kept[-2], shape) is None
    keys = {
        box.key(digest, centre)
        for box in (BOX, Box((16, 20, 25), BOX.spacing_mm, BOX.window_hu), Box(BOX.shape, BOX.spacing_mm, (-1000, 401)))
        for digest in ("a", "b")
        for centre in (None, (1.0, 2.0, 3.0), (1.0, 2.0, 4.0))
    }
    assert len(keys) == 18
