"""`nnssl_stc3d prepare` against plain reading and writing of the same files with SimpleITK, in one process.

Three folders of CT-like volumes: DICOM series and NRRD files, which are converted, and .nii.gz files, which are linked.
"plain" reads each with SimpleITK and writes it as .nii.gz; it makes no body mask, checks nothing and hashes nothing.
Peak memory is that of a process of its own; the last row scans a folder of many entries.
"""

from __future__ import annotations

import gc
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from common import Row, interleaved, machine, parser, ratio, report, seconds

from nnssl_stc3d.prepare.case import Channel, DatasetTarget
from nnssl_stc3d.prepare.convert import Job, convert_case
from nnssl_stc3d.prepare.find import find_volumes
from nnssl_stc3d.prepare.parallel import default_jobs, quiet_itk
from nnssl_stc3d.prepare.scan import cases_by_name

CT = (Channel("CT", "CT"),)


def make_ct(seed: int, shape: tuple[int, int, int]) -> np.ndarray:
    """A body with lungs and organs in noise, (z, y, x) int16 in HU."""
    rng = np.random.default_rng(seed)
    z, y, x = np.ogrid[tuple(slice(-1, 1, n * 1j) for n in shape)]
    body = (x / 0.85) ** 2 + (y / 0.65) ** 2 < 1
    lung = (abs(x) - 0.35) ** 2 / 0.06 + y**2 / 0.12 + (z - 0.5) ** 2 / 0.3 < 1
    image = np.where(body & ~lung, 45, -1000).astype(np.float32)
    image[np.broadcast_to(lung, shape)] = -850
    image += rng.normal(0, 12, shape).astype(np.float32)
    return image.clip(-1024, 1500).astype(np.int16)


def write_scans(folder: Path, kind: str, count: int, shape: tuple[int, int, int]) -> None:
    """Writes volumes of one kind: "dicom", ".nrrd" or ".nii.gz"."""
    for index in range(count):
        image = sitk.GetImageFromArray(make_ct(index, shape))
        image.SetSpacing((0.8, 0.8, 2.0))
        if kind != "dicom":
            folder.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(image, str(folder / f"scan{index}{kind}"), True)
            continue
        series = folder / f"patient{index}"
        series.mkdir(parents=True)
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        for k in range(shape[0]):
            plane = image[:, :, k : k + 1]
            for tag, value in (
                ("0008|0018", f"1.2.{index}.{k + 1}"), ("0008|0060", "CT"), ("0020|000e", f"1.2.{index}"),
                ("0020|000d", f"1.3.{index}"), ("0020|0032", f"0\\0\\{2 * k}"), ("0020|0037", "1\\0\\0\\0\\1\\0"),
            ):  # fmt: skip
                plane.SetMetaData(tag, value)
            writer.SetFileName(str(series / f"{k:04d}.dcm"))
            writer.Execute(plane)


def plain(folder: Path, kind: str, output: Path) -> None:
    """Reads every volume and writes it, as a script of a few lines would."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    for path in sorted(folder.iterdir()):
        if kind == "dicom":
            reader = sitk.ImageSeriesReader()
            reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(path)))
            image = reader.Execute()
        else:
            image = sitk.ReadImage(str(path))
        sitk.WriteImage(image, str(output / f"{path.name.split('.')[0]}_0000.nii.gz"), True)


def prepared(folder: Path, output: Path) -> None:
    """Searches the folder and makes all cases, in this process."""
    shutil.rmtree(output, ignore_errors=True)
    for case in cases_by_name(find_volumes(folder), folder, CT):
        target = DatasetTarget(output, CT)
        if convert_case(Job(case.case, target.channels, output, output, ".nii.gz")).record is None:
            raise RuntimeError(f"{case.case.name} failed")


def _peak(function: Callable[..., None], arguments: tuple, queue: multiprocessing.Queue) -> None:
    quiet_itk()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, which is that of the imports
    before = _status("VmRSS")
    function(*arguments)
    queue.put(_status("VmHWM") - before)


def _status(key: str) -> float:
    """Bytes of a line of Linux' account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak_bytes(function: Callable[..., None], *arguments: object) -> float:
    """Memory that a call adds to a fresh process at its peak (Linux)."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(function, arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return float(result)


def scan_seconds(folder: Path, entries: int) -> float:
    """Time to look through a folder of small NIfTI files, DICOM slices and files of no interest."""
    folder.mkdir()
    small = sitk.GetImageFromArray(make_ct(0, (16, 16, 16)))
    sitk.WriteImage(small, str(folder / "first.nii.gz"), True)
    content = (folder / "first.nii.gz").read_bytes()
    write_scans(folder / "dicom", "dicom", 1, (64, 16, 16))
    slices = [f.read_bytes() for f in sorted((folder / "dicom").rglob("*.dcm"))]
    for index in range(entries):
        sub = folder / f"p{index // 200:03d}"
        sub.mkdir(exist_ok=True)
        if index % 4 == 3:
            (sub / f"{index}.txt").write_text("notes")
        elif index % 4 == 2:
            (sub / f"{index}.dcm").write_bytes(slices[index // 4 % len(slices)])
        else:
            (sub / f"{index}.nii.gz").write_bytes(content)
    start = time.perf_counter()
    find_volumes(folder, jobs=default_jobs())
    return time.perf_counter() - start


def main() -> None:
    """Measure and report."""
    options = parser(__doc__.splitlines()[0]).parse_args()
    count, shape, repeats = (2, (24, 96, 96), 1) if options.quick else (3, (160, 384, 384), 3)
    entries = 500 if options.quick else 20_000
    quiet_itk()
    # `common` imports PyTorch, which the command does not: to search its objects for garbage would cost prepare alone.
    gc.freeze()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for kind in ("dicom", ".nrrd", ".nii.gz"):
            folder = root / f"in{kind}"
            write_scans(folder, kind, count, shape)
            output = root / "out"
            timings = interleaved(
                {
                    "plain": lambda f=folder, k=kind, o=output: plain(f, k, o),
                    "prepare": lambda f=folder, o=output: prepared(f, o),
                },
                repeats,
            )
            note = (
                f"{count / seconds(timings['prepare']):.2f} against {count / seconds(timings['plain']):.2f} cases/s "
                f"of {shape} voxels"
            )
            speed = ratio(timings["plain"], timings["prepare"])
            rows.append(Row(f"speed, {kind}", speed, 0.8, at_least=True, note=note))
            volume = 2 * float(np.prod(shape))
            memory = {"plain": peak_bytes(plain, folder, kind, output), "prepare": peak_bytes(prepared, folder, output)}
            note = f"prepare / plain; {memory['prepare'] / volume:.1f} and {memory['plain'] / volume:.1f} volumes"
            rows.append(Row(f"peak memory, {kind}", memory["prepare"] / max(memory["plain"], 1), note=note))
        elapsed = scan_seconds(root / "many", entries)
        rows.append(Row(f"seconds to scan {entries} entries", elapsed, 60, note=f"{default_jobs()} processes"))
    report("prepare against reading and writing with SimpleITK", rows, machine(), options)


if __name__ == "__main__":
    main()
