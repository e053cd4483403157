"""Each thing that can be wrong is found and comes with its fix."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path

import pytest

from nnssl_stc3d.cli import doctor
from nnssl_stc3d.cli.main import main
from nnssl_stc3d.cli.trainers import trainers_folder


@pytest.fixture
def healthy(monkeypatch, tmp_path):
    """An environment in which nothing is wrong."""
    for variable, name in doctor.FOLDERS.items():
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def wrong(checks):
    return [check for check in checks if check.status == doctor.WRONG]


def test_healthy_environment_passes(healthy, capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "Everything that a training needs is there." in printed
    assert "STC3DPretrainTrainer: found by nnU-Net" in printed and "-device c" in printed
    assert "wrong" not in printed


def test_nothing_set_prints_the_export_lines(monkeypatch, capsys):
    for variable in (*doctor.FOLDERS, "nnUNet_extTrainer"):
        monkeypatch.delenv(variable, raising=False)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert 'mkdir -p "$HOME/nnunet/raw" && export nnUNet_raw="$HOME/nnunet/raw"' in printed
    assert 'export nnUNet_extTrainer="$(nnssl_stc3d trainers)"' in printed
    assert "4 things are wrong" in printed


def test_folder_that_does_not_exist(healthy, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(healthy / "nowhere"))
    (check,) = wrong(doctor.check_folders())
    assert check.name == "nnUNet_results" and check.fix == f'mkdir -p "{healthy / "nowhere"}"'


def test_folder_that_cannot_be_written(healthy, monkeypatch):
    def refuse(dir):
        raise PermissionError("read-only")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    checks = list(doctor.check_folders())
    assert [check.status for check in checks] == [doctor.WARNING, doctor.WRONG, doctor.WRONG]
    assert all("cannot be written" in check.found for check in checks)


def test_full_disk_is_a_warning(healthy, monkeypatch):
    usage = doctor.shutil.disk_usage(healthy)._replace(free=2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    statuses = {check.name: check.status for check in doctor.check_folders()}
    assert statuses == {"nnUNet_raw": "ok", "nnUNet_preprocessed": "warning", "nnUNet_results": "warning"}


def test_other_trainers_are_kept_when_ours_are_added(healthy, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(healthy))
    (check,) = doctor.check_trainers()
    assert check.status == doctor.WRONG
    assert check.fix == f'export nnUNet_extTrainer="$nnUNet_extTrainer{os.pathsep}$(nnssl_stc3d trainers)"'


def test_folder_with_a_broken_module_is_reported_by_the_look_up(healthy, monkeypatch):
    broken = healthy / "others"
    broken.mkdir()
    (broken / "my_broken_trainer.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.setenv("nnUNet_extTrainer", f"{broken}{os.pathsep}{trainers_folder()}")
    failures = wrong(doctor.check_trainers())
    assert [check.name for check in failures] == list(doctor.TRAINERS)
    assert "while importing my_broken_trainer" in failures[0].found
    assert "a_package_that_nobody_has" in failures[0].found
    assert str(trainers_folder()) in failures[0].fix


def test_listed_folder_that_is_gone_is_a_warning(healthy, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", f"{trainers_folder()}{os.pathsep}{healthy / 'gone'}")
    warnings = [check for check in doctor.check_trainers() if check.status == doctor.WARNING]
    assert len(warnings) == 1 and "gone" in warnings[0].found


def test_old_and_missing_packages(monkeypatch):
    versions = {**dict.fromkeys(doctor.PACKAGES, "9.0"), "nnunetv2": "2.8.0"}
    del versions["blosc2"]

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    old, missing = wrong(doctor.check_packages())
    assert old.found == "2.8.0, needed is at least 2.8.1" and "--upgrade 'nnunetv2>=2.8.1'" in old.fix
    assert missing.found == "not installed" and missing.fix.endswith("'blosc2'")


def test_versions_are_compared_by_numbers():
    assert doctor.parse_version("2.10.0+cpu") > doctor.parse_version("2.9")
    assert doctor.parse_version("2.8.1rc1") == (2, 8, 1)


def test_packages_are_those_of_the_installation():
    required = [line for line in importlib.metadata.requires("nnssl_stc3d") or [] if "extra ==" not in line]
    parsed = dict(re.fullmatch(r"([\w-]+)(?:>=)?([\d.]*)", line).groups() for line in required)
    assert parsed == doctor.PACKAGES


def test_old_python(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 1))
    (check,) = doctor.check_python()
    assert check.status == doctor.WRONG and "3.10 or newer and below 3.14" in check.found


def test_missing_command(healthy, monkeypatch):
    monkeypatch.setattr(doctor.sysconfig, "get_path", lambda name: str(healthy))
    failures = wrong(doctor.check_commands())
    assert [check.name for check in failures] == list(doctor.COMMANDS)
    assert "--force-reinstall --no-deps nnunetv2" in failures[0].fix


def test_commands_of_another_environment(healthy, monkeypatch):
    for name in doctor.COMMANDS:
        file = healthy / name
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(healthy))
    checks = list(doctor.check_commands())
    assert {check.status for check in checks} == {doctor.WARNING}
    assert 'export PATH="' in checks[0].fix and str(healthy) in checks[0].found


def test_small_shared_memory(monkeypatch):
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this platform")
    usage = doctor.shutil.disk_usage("/dev/shm")._replace(total=64 * 2**20)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    (check,) = doctor.check_shared_memory()
    assert check.status == doctor.WARNING and "--shm-size" in check.fix
