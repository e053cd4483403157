"""LUNA16, the COVID-19 CTs of TCIA and CC-CCII: where their files lie."""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nnssl_stc3d.prepare.checks import Problem, VolumeError
from nnssl_stc3d.prepare.corpora.corpus import CorpusCase, CorpusOptions, by_name, matches
from nnssl_stc3d.prepare.dicom import is_dicom
from nnssl_stc3d.prepare.find import Found, probe_files
from nnssl_stc3d.prepare.parallel import run_all
from nnssl_stc3d.prepare.scan import case_name, volume_name
from nnssl_stc3d.prepare.slices import SliceStack

# Folder of the collection, or of a patient of it.
_COLLECTION = re.compile(r"ct[-_ ]images[-_ ]in[-_ ]covid[-_ ]19", re.IGNORECASE)
_PATIENT = re.compile(r"volume-covid19-a-\d{4}", re.IGNORECASE)
_CLASSES = "NCP|CP|Normal"
_CCCII_TABLE = "unzip_filenames.csv"


def list_luna16(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """Ten folders, which are the folds of the published cross-validation; names are those of annotations.csv."""
    cases = []
    found = by_name(files, r"subset\d/(?P<id>[\d.]+)\.mhd")
    for name, path in found.items():
        cases.append(CorpusCase(name, (path,), fold=int(path.parent.name[-1])))
    return cases


def list_tcia_covid19(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """The NIfTI files of the collection, or else its DICOM series."""
    nifti = by_name(files, r"(?P<id>volume-covid19-A-\d{4}(?:_\d+)?)(?:_ct)?\.nii(?:\.gz)?")
    if nifti:
        return [CorpusCase(name, (path,), patient=name) for name, path in nifti.items()]
    roots = {path: root for path in files if (root := _collection(path)) is not None}
    search = probe_files([path for path in roots if is_dicom(path)], None, options.jobs)
    # Slices that cannot be read belong to no series that is known.
    cases = [CorpusCase(case_name([problem.where]), (), problems=(problem,)) for problem in search.problems]
    for found in search.volumes:
        root = roots[found.volume.files[0]]
        patient = found.volume.files[0].relative_to(root).parts[0]
        cases.append(CorpusCase(volume_name(found, root), (found,), patient=patient))
    return cases


def _collection(path: Path) -> Path | None:
    """Folder that holds the folders of the patients; None if the file belongs to something else."""
    for folder in path.parents:
        if _COLLECTION.fullmatch(folder.name):
            return folder
        if _PATIENT.fullmatch(folder.name):
            return folder.parent
    return None


def list_cc_ccii(files: Sequence[Path], options: CorpusOptions) -> list[CorpusCase]:
    """Folders of slices: class/patient/scan/0000.png.

    Raises:
        ValueError: no spacing was given; the slices have none.
    """
    scans: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    pattern = rf"(?P<label>{_CLASSES})/(?P<patient>\d+)/(?P<scan>\d+)/\d+\.(?:png|jpg|jpeg)"
    for path, match in matches(files, pattern):
        scans[match["label"], match["patient"], match["scan"]].append(path)
    if not scans:
        return []
    if options.spacing is None:
        raise ValueError(
            "The slices of CC-CCII have no voxel size, and none was published. Pass one for all scans: --spacing Z Y X "
            "in mm. Whatever you pass is a guess; documentation/corpora.md says what depends on it."
        )
    expected = _published_counts(files)
    stacks = [(key, SliceStack.of(paths, options.spacing)) for key, paths in sorted(scans.items())]
    cases = {}
    for key, found in run_all(_look, stacks, options.jobs, "scans"):
        count, there = expected.get(key), len(found.volume.files)
        message = f"has {there} slices, {_CCCII_TABLE} says {count}"
        wrong = found.header is not None and count not in (None, there)
        problems = (Problem("missing-slices", message, found.volume.id),) if wrong else ()
        cases[key] = CorpusCase(case_name(key), (found,), diagnosis=key[0], patient=key[1], problems=problems)
    return [cases[key] for key, _ in stacks]


def _look(item: tuple[tuple[str, str, str], SliceStack]) -> tuple[tuple[str, str, str], Found]:
    key, stack = item
    size = sum(path.stat().st_size for path in stack.files)
    try:
        return key, Found(stack, stack.header(), (), size)
    except VolumeError as error:
        return key, Found(stack, None, (error.problem,), size)


def _published_counts(files: Sequence[Path]) -> dict[tuple[str, str, str], int]:
    """Slices of each scan, from the table that is published with the corpus; empty if it is not there.

    Raises:
        ValueError: the table is not the published one.
    """
    table = next((path for path in files if path.name == _CCCII_TABLE), None)
    if table is None:
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            return {(r["label"], r["patient_id"], r["scan_id"]): int(r["n_slice"]) for r in csv.DictReader(file)}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{table} has no columns label, patient_id, scan_id and n_slice ({error!r}). Download it again, or move it "
            "away: it is only used to see whether scans are complete."
        ) from error
