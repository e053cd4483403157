"""The align-plans command: what it runs, writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnssl_stc3d.cli import align_plans
from nnssl_stc3d.cli.main import main

PRETRAINING, TARGET = "Dataset801_Unlabelled", "Dataset004_Liver"
BOTH = ["align-plans", "--pretrain", "801", "--target", "4"]
FINGERPRINT = {"shapes_after_crop": [[60, 60, 60]] * 3, "spacings": [[1.5, 1.0, 1.0]] * 3}


@pytest.fixture
def roots(tiny_plans, tiny_dataset_json, tmp_path, monkeypatch):
    """Two datasets that nnU-Net planned; the target is flat."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    for dataset, changes in ((PRETRAINING, {}), (TARGET, {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]})):
        write_dataset(tmp_path, dataset, tiny_plans(**changes), tiny_dataset_json())
    return tmp_path


def write_dataset(root: Path, dataset: str, plans: dict, dataset_json: dict) -> None:
    for parent in ("nnUNet_raw", "nnUNet_preprocessed"):
        (root / parent / dataset).mkdir(exist_ok=True)
        (root / parent / dataset / "dataset.json").write_text(json.dumps(dataset_json))
    folder = root / "nnUNet_preprocessed" / dataset
    (folder / f"{plans['plans_name']}.json").write_text(json.dumps({**plans, "dataset_name": dataset}))
    (folder / "dataset_fingerprint.json").write_text(json.dumps(FINGERPRINT))


def preprocessed(root: Path, dataset: str) -> Path:
    return root / "nnUNet_preprocessed" / dataset


def snapshot(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_the_pretraining_gets_the_targets_network(roots, capsys):
    before = snapshot(roots)
    assert main(BOTH) == 0
    file = preprocessed(roots, PRETRAINING) / "nnUNetPlans_Dataset004.json"
    assert set(snapshot(roots)) - set(before) == {file}
    assert all(file.read_bytes() == content for file, content in before.items())
    configuration = PlansManager(str(file)).get_configuration("3d_fullres")
    assert configuration.network_arch_init_kwargs["kernel_sizes"][0] == [1, 3, 3]
    output = capsys.readouterr().out
    assert "kernel sizes" in output and "1x3x3, 2 of 3x3x3" in output and f"Wrote {file}" in output
    commands = [line.strip() for line in output.split("Next:")[1].splitlines() if line.strip()]
    assert commands[:2] == [
        "nnUNetv2_preprocess -d 801 -plans_name nnUNetPlans_Dataset004 -c 3d_fullres",
        "nnUNetv2_preprocess -d 4 -plans_name nnUNetPlans -c 3d_fullres",
    ]
    assert "nnUNetv2_train 801 3d_fullres all -tr STC3DPretrainTrainer -p nnUNetPlans_Dataset004" in commands
    weights = (
        f'"$nnUNet_results/{PRETRAINING}/STC3DPretrainTrainer__nnUNetPlans_Dataset004__3d_fullres/fold_all/'
        'checkpoint_final.pth"'
    )
    finetune = f"nnUNetv2_train 4 3d_fullres 0 -tr STC3DFinetuneTrainer -p nnUNetPlans -pretrained_weights {weights}"
    assert finetune in commands
    assert commands[-1].startswith("nnUNetv2_predict -i IN -o OUT -d 4 -c 3d_fullres -f 0 ")


def test_data_that_is_preprocessed_already_is_not_preprocessed_again(roots, capsys):
    (preprocessed(roots, TARGET) / "nnUNetPlans_3d_fullres").mkdir()
    assert main(BOTH) == 0
    assert "nnUNetv2_preprocess -d 4 " not in capsys.readouterr().out


def test_the_target_gets_the_pretrainings_network(roots, capsys):
    assert main([*BOTH, "--to", "pretraining", "-o", "mine"]) == 0
    file = preprocessed(roots, TARGET) / "mine.json"
    plans = json.loads(file.read_text(encoding="utf-8"))
    assert plans["dataset_name"] == TARGET
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["kernel_sizes"] == [[3, 3, 3]] * 3
    output = capsys.readouterr().out
    assert "nnUNetv2_preprocess -d 4 -plans_name mine -c 3d_fullres" in output
    assert "-p mine -pretrained_weights" in output and "nnUNetv2_train 801" not in output


def test_the_target_gets_the_plans_of_a_checkpoint(roots, tiny_plans, pretraining_checkpoint, capsys):
    """Weights from elsewhere, whose dataset is not here."""
    plans = tiny_plans() | {"dataset_name": "Dataset700_Elsewhere", "plans_name": "theirs"}
    file = roots / "with space.pth"
    torch.save(pretraining_checkpoint(plans), file)
    assert main(["align-plans", "--checkpoint", str(file), "--target", TARGET]) == 0
    written = json.loads((preprocessed(roots, TARGET) / "theirs_Dataset700.json").read_text(encoding="utf-8"))
    assert (
        written["configurations"]["3d_fullres"]["architecture"] == plans["configurations"]["3d_fullres"]["architecture"]
    )
    assert f"-p theirs_Dataset700 -pretrained_weights '{file}'" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["nnunet", "safetensors"])
def test_the_target_gets_the_plans_of_an_exported_encoder(roots, tiny_plans, pretraining_checkpoint, form):
    """Without touching what is preprocessed: the folder of the data is one of its own."""
    torch.save(pretraining_checkpoint(tiny_plans()), roots / "checkpoint_final.pth")
    file = roots / {"nnunet": "encoder.pth", "safetensors": "encoder.safetensors"}[form]
    assert main(["export", str(roots / "checkpoint_final.pth"), "-o", str(file), "--format", form]) == 0
    assert main(["align-plans", "--checkpoint", str(file), "--target", "4"]) == 0
    configurations = [
        json.loads((preprocessed(roots, TARGET) / f"{name}.json").read_text(encoding="utf-8"))["configurations"]
        for name in ("nnUNetPlans", "nnUNetPlans_Dataset801")
    ]
    own, aligned = (found["3d_fullres"]["data_identifier"] for found in configurations)
    assert (own, aligned) == ("nnUNetPlans_3d_fullres", "nnUNetPlans_Dataset801_3d_fullres")


@pytest.mark.parametrize("to", ["target", "pretraining"])
@pytest.mark.parametrize(
    ("network", "trainer"),
    [
        ("nnssl_stc3d.modules.primus.PlansPrimus", "AlicePrimusPretrainTrainer"),
        ("nnssl_stc3d.modules.swin_unetr.PlansSwinUNETR", None),
        ("nnssl_stc3d.modules.fpn.VoxelFPN", "STC3DPretrainTrainer"),
    ],
)
def test_the_trainer_suits_the_network(roots, tiny_plans, tiny_dataset_json, capsys, network, trainer, to):
    plans = tiny_plans()
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = network
    for dataset in (PRETRAINING, TARGET):
        write_dataset(roots, dataset, plans | {"plans_name": "others"}, tiny_dataset_json())
    assert main([*BOTH, "-p", "others", "--to", to]) == 0
    printed = capsys.readouterr().out.split("Next:")[1]
    assert ("nnUNetv2_train 801" in printed) == (to == "target" and trainer is not None)
    if trainer:
        assert f"/{trainer}__others" in printed and "Nothing in nnssl_stc3d" not in printed
        assert to == "pretraining" or f"-tr {trainer} -p others_Dataset004" in printed
    else:
        assert "# Nothing in nnssl_stc3d pretrains the network" in printed and "-pretrained_weights WEIGHTS" in printed
        assert "PretrainTrainer" not in printed


def test_the_papers_configuration_is_written_for_both(roots, capsys):
    assert main([*BOTH, "--paper"]) == 0
    for dataset, patch in ((PRETRAINING, 128), (TARGET, 96)):
        plans = json.loads((preprocessed(roots, dataset) / "nnUNetPlans_STC3DPaper.json").read_text(encoding="utf-8"))
        assert plans["configurations"]["3d_fullres"]["patch_size"] == [patch] * 3
        assert plans["dataset_name"] == dataset
    output = capsys.readouterr().out
    assert "250, mean -175, std 425" in output and "views are half of it: 64" in output
    assert output.count("nnUNetv2_preprocess") == 2
    assert "all -tr STC3DPaperPretrainTrainer -p nnUNetPlans_STC3DPaper" in output
    assert "/STC3DPaperPretrainTrainer__nnUNetPlans_STC3DPaper__3d_fullres/" in output


def test_a_dry_run_says_the_same_and_writes_nothing(roots, capsys):
    before = snapshot(roots)
    assert main([*BOTH, "--dry-run"]) == 0
    dry = capsys.readouterr().out
    assert snapshot(roots) == before and "Would write" in dry
    assert main(BOTH) == 0
    assert capsys.readouterr().out == dry.replace("Would write", "Wrote")


def test_a_second_run_changes_nothing(roots, capsys):
    assert main(BOTH) == 0
    before = snapshot(roots)
    assert main(BOTH) == 0
    assert "is there already and is the same" in capsys.readouterr().out and snapshot(roots) == before


def test_other_plans_of_that_name_are_kept(roots, capsys):
    file = preprocessed(roots, PRETRAINING) / "nnUNetPlans_Dataset004.json"
    file.write_text('{"plans_name": "precious"}')
    before = snapshot(roots)
    assert main(BOTH) == 1
    assert "exists and differs from these plans. Choose another name with -o" in capsys.readouterr().err
    assert snapshot(roots) == before


def test_data_left_by_other_plans_is_not_taken_for_these(roots, capsys):
    (preprocessed(roots, PRETRAINING) / "nnUNetPlans_Dataset004_3d_fullres").mkdir()
    assert main(BOTH) == 1
    assert "preprocessed with other plans" in capsys.readouterr().err


def test_the_papers_plans_are_written_for_both_or_for_none(roots, capsys):
    (preprocessed(roots, TARGET) / "nnUNetPlans_STC3DPaper.json").write_text("{}")
    assert main([*BOTH, "--paper"]) == 1
    assert "exists and differs" in capsys.readouterr().err
    assert not (preprocessed(roots, PRETRAINING) / "nnUNetPlans_STC3DPaper.json").exists()


# ---- what is missing ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_run_first(roots, tiny_plans, monkeypatch, capsys):
    """Neither has been planned; nnU-Net's commands are played by a function that leaves what they leave."""
    monkeypatch.delenv("nnUNet_def_n_proc", raising=False)
    resenc = tiny_plans("ResidualEncoderUNet") | {"plans_name": "nnUNetResEncUNetMPlans"}
    for dataset in (PRETRAINING, TARGET):
        for file in preprocessed(roots, dataset).iterdir():
            file.unlink()
    ran = []

    def planned(words):
        ran.append(words)
        dataset = {"801": PRETRAINING, "4": TARGET}[words[2]]
        plans = resenc if "nnUNetPlannerResEncM" in words else tiny_plans()
        write_dataset(
            roots,
            dataset,
            plans,
            json.loads((roots / "nnUNet_raw" / dataset / "dataset.json").read_text(encoding="utf-8")),
        )

    monkeypatch.setattr(align_plans, "_run", planned)
    command = [*BOTH, "-p", "nnUNetResEncUNetMPlans", "-np", "3"]
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert not ran and "nnUNetv2_plan_and_preprocess -d 4 -pl nnUNetPlannerResEncM --no_pp -npfp 3" in shown
    assert main(command) == 0
    assert [words[:5] for words in ran] == [
        ["nnUNetv2_plan_and_preprocess", "-d", "801", "-pl", "ExperimentPlanner"],
        ["nnUNetv2_plan_and_preprocess", "-d", "4", "-pl", "nnUNetPlannerResEncM"],
    ]
    written = json.loads(
        (preprocessed(roots, PRETRAINING) / "nnUNetResEncUNetMPlans_Dataset004.json").read_text(encoding="utf-8")
    )
    architecture = written["configurations"]["3d_fullres"]["architecture"]
    assert architecture["network_class_name"].endswith("ResidualEncoderUNet")


def test_only_the_fingerprint_is_missing(roots, monkeypatch):
    (preprocessed(roots, PRETRAINING) / "dataset_fingerprint.json").unlink()
    (preprocessed(roots, TARGET) / "dataset_fingerprint.json").unlink()
    ran = []
    monkeypatch.setattr(align_plans, "_run", lambda words: ran.append(words))
    assert main([*BOTH, "-np", "1"]) == 0
    # The target's images are not looked at.
    assert ran == [["nnUNetv2_extract_fingerprint", "-d", "801", "-np", "1"]]


def test_dataset_json_is_put_beside_the_plans(roots):
    file = preprocessed(roots, PRETRAINING) / "dataset.json"
    content = file.read_bytes()
    file.unlink()
    assert main(BOTH) == 0
    assert file.read_bytes() == content


def test_a_failing_command_ends_it(roots, monkeypatch, capsys):
    (preprocessed(roots, PRETRAINING) / "dataset_fingerprint.json").unlink()
    monkeypatch.setattr(align_plans, "find_program", lambda name: ["false"])
    assert main(BOTH) == 1
    assert "failed with exit code 1" in capsys.readouterr().err
    assert not (preprocessed(roots, PRETRAINING) / "nnUNetPlans_Dataset004.json").exists()


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "4"], "Expected --pretrain DATASET, or --checkpoint FILE"),
        (["--pretrain", "4", "--target", "4"], "are both Dataset004_Liver"),
        (["--pretrain", "801", "--target", "5"], "Expected one dataset Dataset005_*"),
        (["--pretrain", "801", "--target", "4", "-p", "Other"], "this dataset has nnUNetPlans. Choose one with -p"),
        (["--pretrain", "801", "--target", "4", "-o", "a__b"], "plain name without '__'"),
        (["--pretrain", "801", "--target", "4", "-c", "2d"], "no usable configuration 2d"),
        (["--pretrain", "801", "--target", "4", "-np", "0"], "at least one process, got 0"),
        (["--pretrain", "801", "--target", "4", "--paper", "--to", "target"], "leave out --to"),
        (["--checkpoint", "x.pth", "--target", "4", "--paper"], "brings its own plans"),
        (["--checkpoint", "x.pth", "--target", "4"], "x.pth is not there"),
    ],
)
def test_bad_arguments_are_refused(roots, arguments, message, capsys):
    before = snapshot(roots)
    assert main(["align-plans", *arguments]) == 1
    assert message in capsys.readouterr().err
    assert snapshot(roots) == before


def test_weights_without_plans_are_refused(roots, tiny_plans, tiny_network, capsys):
    torch.save({"network_weights": tiny_network(tiny_plans()).state_dict()}, roots / "weights.pth")
    assert main(["align-plans", "--checkpoint", str(roots / "weights.pth"), "--target", "4"]) == 1
    assert "Expected a checkpoint with plans and dataset.json" in capsys.readouterr().err


def test_the_configuration_of_a_checkpoint_is_the_one_it_was_trained_with(
    roots, tiny_plans, pretraining_checkpoint, capsys
):
    torch.save(pretraining_checkpoint(tiny_plans()), roots / "x.pth")
    assert main(["align-plans", "--checkpoint", str(roots / "x.pth"), "--target", "4", "-c", "3d_lowres"]) == 1
    assert "trained with -c 3d_fullres, got 3d_lowres" in capsys.readouterr().err


def test_broken_files_are_named(roots, capsys):
    (preprocessed(roots, PRETRAINING) / "dataset_fingerprint.json").write_text("{")
    assert main(BOTH) == 1
    assert "dataset_fingerprint.json is not valid JSON" in capsys.readouterr().err


def test_a_dataset_that_is_not_there_raw_cannot_be_planned(roots, capsys):
    for file in preprocessed(roots, PRETRAINING).iterdir():
        file.unlink()
    (roots / "nnUNet_raw" / PRETRAINING / "dataset.json").unlink()
    assert main(BOTH) == 1
    assert "has to be planned first, but there is no" in capsys.readouterr().err
