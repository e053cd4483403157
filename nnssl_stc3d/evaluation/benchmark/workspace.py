"""The folder of a benchmark: links to the user's data, folds of its own, and a module of trainers.

Nothing is written into the user's folders. The test cases are not linked, so that no training can see them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.data.raw_files import RawCase, list_cases
from nnssl_stc3d.evaluation.benchmark.design import Split
from nnssl_stc3d.evaluation.benchmark.methods import Method
from nnssl_stc3d.evaluation.benchmark.same_images import find_same_images
from nnssl_stc3d.files import written_whole

TRAINERS_FILE = "benchmark_trainers.py"
UNFINISHED = ", unfinished"
"""Ending of the name of a command in a cost file that was interrupted or failed."""


@dataclass(frozen=True)
class Dataset:
    """A dataset of the user.

    Attributes:
        raw: nnUNet_raw/DatasetXXX_Name, or None if only preprocessed data are needed.
        preprocessed: nnUNet_preprocessed/DatasetXXX_Name.
        plans: content of the plans file.
        configuration: such as "3d_fullres".
    """

    raw: Path | None
    preprocessed: Path
    plans: dict[str, Any]
    configuration: str

    @property
    def name(self) -> str:
        """DatasetXXX_Name."""
        return self.preprocessed.name

    @property
    def number(self) -> str:
        """Number for nnU-Net's commands."""
        return str(int(self.name[7:10]))

    @property
    def data(self) -> Path:
        """Folder of the preprocessed cases."""
        return self.preprocessed / PlansManager(self.plans).get_configuration(self.configuration).data_identifier

    def cases(self) -> list[str]:
        """Identifiers of the preprocessed cases.

        Raises:
            ValueError: there are none.
        """
        found = sorted(f.name[: -len("_seg.b2nd")] for f in self.data.glob("*_seg.b2nd"))
        if not found:
            raise ValueError(
                f"expected preprocessed cases in {self.data}, found none. Run nnUNetv2_preprocess -d {self.number} "
                f"-plans_name {self.plans['plans_name']} -c {self.configuration}"
            )
        return found

    def raw_cases(self, names: Iterable[str]) -> tuple[str, dict[str, RawCase]]:
        """Raw files of cases that are to be predicted.

        Returns:
            The ending of their files, and case -> its files, which exist.

        Raises:
            ValueError: files are missing.
        """
        if self.raw is None:
            raise ValueError(f"the raw data of {self.name} are needed to predict its test cases")
        description = json.loads((self.raw / "dataset.json").read_text(encoding="utf-8"))
        ending, channels = description["file_ending"], len(description["channel_names"])
        raw = {case.name: case for case in list_cases(self.raw, description)}
        for name in names:
            images = [file for file in raw[name].images if file.exists()] if name in raw else []
            unlabelled = name in raw and not raw[name].label.exists()
            if len(images) != channels or unlabelled:
                raise ValueError(
                    f"expected {channels} images of {name}, such as imagesTr/{name}_0000{ending}, and its label map in "
                    f"{self.raw}, found {len(images)}{' and no label map' if unlabelled else ''}. Its raw data are "
                    "needed to predict it: restore them, or leave the case out with --split."
                )
        return ending, raw


@dataclass(frozen=True)
class Workspace:
    """Folders below the folder of a benchmark.

    Attributes:
        root: that folder, absolute.
    """

    root: Path

    @property
    def preprocessed(self) -> Path:
        """nnUNet_preprocessed of all runs."""
        return self.root / "nnUNet_preprocessed"

    @property
    def trainers(self) -> Path:
        """Folder for nnUNet_extTrainer."""
        return self.root / "trainers"

    def results(self, start: str) -> Path:
        """nnUNet_results of the runs that begin with one start; they share trainers, not weights."""
        return self.root / "results" / start

    def cases(self, kind: str) -> tuple[Path, Path]:
        """Images and labels of the "test" or "validation" cases."""
        return self.root / kind / "images", self.root / kind / "labels"

    def dataset_json(self, dataset: Dataset) -> dict[str, Any]:
        """What nnU-Net knows about a dataset: labels, channels, file ending."""
        file = self.preprocessed / dataset.name / "dataset.json"
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return content

    def ending(self, dataset: Dataset) -> str:
        """File ending of a dataset's images."""
        return str(self.dataset_json(dataset)["file_ending"])

    def link_datasets(self, target: Dataset, split: Split, device: str, pretraining: Dataset | None = None) -> None:
        """Links what runs may see, and writes folds of their own.

        Args:
            target: the labelled dataset.
            split: its cases.
            device: of all runs; a budget in seconds is translated into steps of it.
            pretraining: the dataset to pretrain on; None takes the target's development cases.

        Raises:
            ValueError: files are missing, or the folder belongs to a benchmark with other data.
        """
        self._fix_data(target, pretraining or target, device)
        self._link_preprocessed(target, split.development)
        if pretraining is not None:
            self._link_preprocessed(pretraining, self._without_test_cases(pretraining, target, split))
        ending, raw = target.raw_cases([*split.test, *split.validation])
        for kind, names in (("test", split.test), ("validation", split.validation)):
            images, labels = self.cases(kind)
            for name in names:
                found, label = raw[name].images, raw[name].label
                for channel, file in enumerate(found):
                    _link_as(images / f"{name}_{channel:04d}{ending}", file)
                _link_as(labels / f"{name}{ending}", label)
                # Where nnU-Net looks for the spacing of a TIFF, which has none.
                for folder, file, cut in ((images, found[0], f"_0000{ending}"), (labels, label, ending)):
                    spacing = file.with_name(f"{file.name[: -len(cut)]}.json")
                    if spacing.is_file():
                        _link_as(folder / f"{name}.json", spacing)

    def _fix_data(self, target: Dataset, pretraining: Dataset, device: str) -> None:
        """Runs are told apart by method, length, labels and seed, so that everything else has to stay as it was."""
        data = {
            "dataset": target.name,
            "configuration": target.configuration,
            "plans": target.plans["plans_name"],
            "pretraining dataset": pretraining.name,
            "plans of the pretraining": pretraining.plans["plans_name"],
            "device": device,
        }
        file = self.root / "data.json"
        known = read_json(file, {})
        # Most often, nothing is finished because there is no such device.
        free = () if self._anything_is_finished() else ("device",)
        for key, value in data.items():
            if known.get(key, value) != value and key not in free:
                raise ValueError(
                    f"expected the {key} {known[key]}, with which the benchmark in {self.root} was made, got {value}. "
                    "Choose another output folder."
                )
        write_whole(file, json.dumps(data, indent=1) + "\n")

    def _anything_is_finished(self) -> bool:
        """Whether some command has ended as it should, or the seconds of a step are known."""
        costs = (read_json(file, {}) for file in (self.root / "cost").glob("*.json"))
        finished = any(not command.endswith(UNFINISHED) for cost in costs for command in cost)
        return finished or (self.root / "seconds_per_step.json").is_file()

    def left_out(self) -> dict[str, str]:
        """Case of the pretraining dataset that shows a test case -> that test case."""
        found: dict[str, str] = self._searched()["left_out"]
        return found

    def _searched(self) -> dict[str, Any]:
        """Cases of the pretraining dataset when the benchmark began, and which of them are left out."""
        known: dict[str, Any] = read_json(self.root / "pretraining_cases.json", {"cases": None, "left_out": {}})
        return known

    def _without_test_cases(self, pretraining: Dataset, target: Dataset, split: Split) -> list[str]:
        """Cases that may be pretrained on. They are looked through once, for neither split nor data may change."""
        cases, known = pretraining.cases(), self._searched()["cases"]
        if known is None:
            tested = {name: target.data / f"{name}.b2nd" for name in split.test}
            found = find_same_images(tested, {name: pretraining.data / f"{name}.b2nd" for name in cases})
            content = json.dumps({"cases": cases, "left_out": found}, indent=1)
            write_whole(self.root / "pretraining_cases.json", content + "\n")
        elif known != cases:
            changed = sorted(set(known) ^ set(cases))
            raise ValueError(
                f"the cases of {pretraining.name} have changed since this benchmark began, such as {changed[0]} "
                f"({len(known)} then, {len(cases)} now). Restore them, or choose another output folder."
            )
        left = sorted(set(cases) - set(self.left_out()))
        if not left:
            raise ValueError(f"every case of {pretraining.name} shows a test case of {target.name}: pretrain on others")
        return left

    def _link_preprocessed(self, dataset: Dataset, cases: Iterable[str]) -> None:
        folder = self.preprocessed / dataset.name
        data = dataset.data
        ending = json.loads((dataset.preprocessed / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
        for name in cases:
            _link([data / f"{name}{suffix}" for suffix in (".b2nd", "_seg.b2nd", ".pkl")], folder / data.name)
            truth = dataset.preprocessed / "gt_segmentations" / f"{name}{ending}"
            _link([truth] if truth.exists() else [], folder / "gt_segmentations")
        for file in ("dataset.json", "dataset_fingerprint.json"):
            if (dataset.preprocessed / file).is_file():
                _link([dataset.preprocessed / file], folder)
        plans = folder / f"{dataset.plans['plans_name']}.json"
        text = json.dumps(dataset.plans, indent=4) + "\n"
        if plans.is_file() and plans.read_text(encoding="utf-8") != text:
            raise ValueError(
                f"the plans {dataset.plans['plans_name']} of {dataset.name} have changed since this benchmark began. "
                "Restore them, or choose another output folder."
            )
        plans.write_text(text, encoding="utf-8")

    def fix_methods(self, methods: Iterable[Method]) -> None:
        """Keeps all options of the methods: defaults may change with the version, and runs are found by name.

        Raises:
            ValueError: a method's runs in this folder had other options.
        """
        file = self.root / "methods.json"
        known = read_json(file, {})
        for method in methods:
            # As it comes back from the file, in which tuples are lists.
            now = json.loads(json.dumps(method.config().to_dict()))
            before = known.setdefault(method.key, now)
            changed = sorted(key for key in now.keys() | before.keys() if now.get(key) != before.get(key))
            if changed:
                differences = ", ".join(f"{key}={before.get(key)}, now {now.get(key)}" for key in changed)
                raise ValueError(
                    f"the runs of {method.name} in {self.root} were made with {differences}. Use the version of then, "
                    "or choose another output folder."
                )
        write_whole(file, json.dumps(known, indent=1) + "\n")

    def fold(self, dataset: Dataset, split: Split, count: int, seed: int) -> int:
        """Number of the fold with some labelled cases; new folds are appended, so that numbers never change."""
        file, record = self.preprocessed / dataset.name / "splits_final.json", self.root / "folds.json"
        known = read_json(record, [])
        if [count, seed] not in known:
            known.append([count, seed])
            write_whole(file, json.dumps([split.fold(*key) for key in known], indent=1))
            write_whole(record, json.dumps(known) + "\n")
        return int(known.index([count, seed]))

    def write_trainers(self, source: str) -> None:
        """Writes the module of this benchmark's trainers, whose source is made in trainer_source."""
        write_whole(self.trainers / TRAINERS_FILE, source)


def environment(workspace: Workspace, start: str, threads: int, workers: int) -> dict[str, str]:
    """Variables of a run, besides those of this process.

    Args:
        workspace: of the benchmark.
        start: "scratch" or a method.
        threads: CPU threads of the run, 0 for nnU-Net's own choice.
        workers: nnUNet_n_proc_DA.
    """
    own = {
        "nnUNet_raw": str(workspace.root / "nnUNet_raw"),
        "nnUNet_preprocessed": str(workspace.preprocessed),
        "nnUNet_results": str(workspace.results(start)),
        "nnUNet_extTrainer": str(workspace.trainers),
        "nnUNet_n_proc_DA": str(workers),
        "MPLBACKEND": "Agg",
        # Idle threads that spin slow down the runs beside them.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    if threads:
        own |= {"OMP_NUM_THREADS": str(threads), "nnUNet_def_n_proc": str(threads)}
    return own


def _link(files: Iterable[Path], folder: Path) -> None:
    """Links files into a folder; links that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        _link_as(folder / file.name, file)


def _link_as(link: Path, file: Path) -> None:
    """Links a file; a link that is there stays, unless what it points to has been moved."""
    if not file.exists():
        raise ValueError(f"expected the file {file}, which does not exist. Preprocess the dataset again.")
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        return
    link.unlink(missing_ok=True)
    link.symlink_to(file.resolve())


def read_json(file: Path, otherwise: Any) -> Any:
    """Content of a file, or something else where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else otherwise


def write_whole(file: Path, text: str) -> None:
    """Writes a file that runs may be reading at the same time: it is there in whole or not at all."""
    if file.is_file() and file.read_text(encoding="utf-8") == text:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as beside:
        beside.write_text(text, encoding="utf-8")
