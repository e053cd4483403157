"""Transfer of weights: what arrives, what stays, what is refused, and what nnU-Net's own command then does."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from nnssl_stc3d.modules.classifier import ClassifierNetwork
from nnssl_stc3d.transfer.checkpoint import save_checkpoint_atomically
from nnssl_stc3d.transfer.load import TransferReport, load_pretrained, tensor_groups, use_reporting_loader


def snapshot(network):
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_encoder_and_decoder_arrive_and_segmentation_layers_stay(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, architecture
):
    plans = tiny_plans(architecture)
    checkpoint = pretraining_checkpoint(plans)
    network = tiny_network(plans)
    before = snapshot(network)
    report = load_pretrained(network, checkpoint, plans, configuration)
    for name, tensor in network.state_dict().items():
        expected = before[name] if ".seg_layers." in name else checkpoint["network_weights"][name]
        assert torch.equal(tensor, expected), name
    assert report.parts == ("encoder", "decoder") and not report.adapted and not report.warnings
    assert len(report.loaded) + len(report.fresh) == len(tensor_groups(network)) == len(list(network.parameters()))
    assert {name.rsplit(".", 2)[0] for name in report.fresh} == {"decoder.seg_layers"}


def test_part_that_was_not_trained_stays_fresh(tiny_plans, tiny_network, pretraining_checkpoint):
    plans = tiny_plans()
    network = tiny_network(plans)
    before = snapshot(network)
    report = load_pretrained(network, pretraining_checkpoint(plans, transfers=("encoder",)))
    assert all(name.startswith("encoder.") for name in report.loaded)
    assert all(name.startswith("decoder.") for name in report.fresh)
    after = network.state_dict()
    assert not torch.equal(
        after["encoder.stages.0.0.convs.0.conv.weight"], before["encoder.stages.0.0.convs.0.conv.weight"]
    )
    assert torch.equal(after["decoder.transpconvs.0.weight"], before["decoder.transpconvs.0.weight"])


def test_duplicates_of_the_encoder_do_not_overwrite_it(tiny_plans, tiny_network, pretraining_checkpoint, architecture):
    plans = tiny_plans(architecture)
    checkpoint = pretraining_checkpoint(plans)
    weights = checkpoint["network_weights"]
    for name in [name for name in weights if name.startswith("decoder.encoder.")]:
        weights[name] = torch.full_like(weights[name], 77.0)
    network = tiny_network(plans)
    report = load_pretrained(network, checkpoint)
    encoder = {name: tensor for name, tensor in network.state_dict().items() if name.startswith("encoder.")}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.items())
    assert len(report.warnings) == 1 and "duplicate with other values" in report.warnings[0]


def test_encoder_without_its_duplicate_names_is_enough(tiny_plans, tiny_network, pretraining_checkpoint):
    plans = tiny_plans()
    checkpoint = pretraining_checkpoint(plans, transfers=("encoder",))
    weights = checkpoint["network_weights"]
    checkpoint["network_weights"] = {
        name: weights[name] for name in weights if name.startswith("encoder.") and ".all_modules." not in name
    }
    network = tiny_network(plans)
    load_pretrained(network, checkpoint)
    name = "decoder.encoder.stages.0.0.convs.0.all_modules.0.weight"
    assert torch.equal(network.state_dict()[name], weights[name])


def test_ordinary_nnunet_checkpoint_gives_everything_but_segmentation_layers(tiny_plans, tiny_network):
    plans = tiny_plans()
    weights = tiny_network(plans, classes=5, seed=3).state_dict()
    network = tiny_network(plans, classes=3)
    report = load_pretrained(network, {"network_weights": weights, "trainer_name": "nnUNetTrainer"})
    assert torch.equal(network.state_dict()["decoder.transpconvs.0.weight"], weights["decoder.transpconvs.0.weight"])
    assert {name.rsplit(".", 2)[0] for name in report.fresh} == {"decoder.seg_layers"}
    assert "nnUNetTrainer" in str(report)


def test_wrapped_networks_and_prefixed_weights_fit(tiny_plans, tiny_network, pretraining_checkpoint):
    plans = tiny_plans()
    checkpoint = pretraining_checkpoint(plans)
    expected = checkpoint["network_weights"]["encoder.stages.1.0.convs.0.conv.weight"]
    prefixed = {f"module._orig_mod.{name}": tensor for name, tensor in checkpoint["network_weights"].items()}
    network = tiny_network(plans)
    load_pretrained(torch.compile(network), {**checkpoint, "network_weights": prefixed})
    assert torch.equal(network.state_dict()["encoder.stages.1.0.convs.0.conv.weight"], expected)


def test_other_number_of_channels_adapts_the_stem(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, architecture
):
    plans = tiny_plans(architecture, channels=1)
    target = tiny_plans(architecture, channels=2)
    checkpoint = pretraining_checkpoint(plans)
    network = tiny_network(target, channels=2)
    report = load_pretrained(network, checkpoint, target, configuration)
    (name,) = report.adapted
    key = network.keys_to_in_proj[0] + ".weight"
    source = checkpoint["network_weights"][key]
    assert torch.equal(network.state_dict()[key], torch.cat([source, source], 1) / 2)
    assert report.adapted[name] == "1 -> 2 input channels, repeated and divided by 2"
    assert "1 adapted" in str(report) and name in str(report)


def test_spacing_normalisation_and_patch_size_are_warnings(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration
):
    plans = tiny_plans()
    target = copy.deepcopy(plans)
    target["transpose_forward"] = [1, 0, 2]
    changed = target["configurations"][configuration]
    changed.update(spacing=[3.0, 1.0, 1.0], normalization_schemes=["ZScoreNormalization"], patch_size=[16, 32, 32])
    report = load_pretrained(tiny_network(target), pretraining_checkpoint(plans), target, configuration)
    text = str(report)
    assert len(report.warnings) == 4
    assert "spacing (mm): pretrained with [1.5, 1.0, 1.0], this network has [3.0, 1.0, 1.0]" in text
    assert "normalisation" in text and "patch size" in text and "transposition" in text
    # The datasets are the same, so the pretraining's plans only have to be named.
    assert report.commands[0].startswith("nnUNetv2_train 801 3d_fullres FOLD -p nnUNetPlans ")
    assert report.commands[0] in text


def test_networks_with_a_head_of_their_own_can_be_started_from(tiny_plans, tiny_network, configuration):
    """A classifier, whose U-Net has no decoder, and a probe."""
    plans = tiny_plans()

    def saved(weights):
        content = {"plans": plans, "configuration": configuration, "fold": 0}
        return {"network_weights": weights, "init_args": content, "trainer_name": "STC3DClassifyTrainer"}

    source = tiny_network(plans)
    encoder = {key: value.clone() for key, value in source.encoder.state_dict().items()}
    classifier = saved(ClassifierNetwork(copy.deepcopy(source), 3).state_dict())
    for target in (tiny_network(plans), ClassifierNetwork(tiny_network(plans), 4)):
        report = load_pretrained(target, classifier, plans, configuration)
        assert report.parts == ("encoder",)
        state = getattr(target, "backbone", target).encoder.state_dict()
        assert all(torch.equal(state[key], value) for key, value in encoder.items())
    probe = {f"backbone.{key}": value for key, value in source.state_dict().items()} | {"head.weight": torch.ones(2)}
    target = tiny_network(plans)
    assert load_pretrained(target, saved(probe), plans, configuration).parts == ("encoder", "decoder")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items() if ".seg_" not in k)


def test_other_intensities_of_ct_are_a_warning(tiny_plans, tiny_network, pretraining_checkpoint, configuration):
    """The same scheme with the statistics of another dataset shows the network other values."""

    def ct(mean, percentile):
        plans = tiny_plans()
        plans["configurations"][configuration]["normalization_schemes"] = ["CTNormalization"]
        statistics = {"mean": mean, "std": 76.0, "percentile_00_5": percentile, "percentile_99_5": 270.0}
        plans["foreground_intensity_properties_per_channel"] = {"0": statistics}
        return plans

    source, alike, other = ct(100.0, -958.0), ct(100.04, -958.2), ct(-600.0, -1020.0)
    checkpoint = pretraining_checkpoint(source)
    assert not load_pretrained(tiny_network(alike), checkpoint, alike, configuration).warnings
    (warning,) = load_pretrained(tiny_network(other), checkpoint, other, configuration).warnings
    assert "clip -958 to 270, mean 100, std 76" in str(warning) and "mean -600" in str(warning)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}, "strides: pretrained with"),
        ({"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]}, "kernel sizes: pretrained with"),
        ({"features_per_stage": [4, 8, 16]}, "features per stage: pretrained with"),
        ({"n_conv_per_stage": [1, 2, 2]}, "convolutions per stage: pretrained with"),
    ],
)
def test_other_plan_is_refused_with_the_difference_and_the_fix(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, change, words
):
    target = tiny_plans(**change)
    target.update(dataset_name="Dataset004_Hippocampus")
    network = tiny_network(target)
    before = snapshot(network)
    with pytest.raises(ValueError, match="do not fit this network") as caught:
        load_pretrained(network, pretraining_checkpoint(tiny_plans()), target, configuration)
    message = str(caught.value)
    assert words in message
    assert "align-plans --to pretraining --checkpoint CHECKPOINT --target 4" in message
    assert "nnUNetv2_preprocess -d 4 -plans_name nnUNetPlans_Dataset801 -c 3d_fullres" in message
    assert "align-plans --pretrain 801 --target 4 -p nnUNetPlans -c 3d_fullres" in message
    assert ("NNSSL_STC3D_ADAPT=kernels" in message) == (words.startswith("kernel"))
    resolved = "(resolved by 1 or 2 or 3)" if words.startswith("kernel") else "(resolved by 1 or 2)"
    assert resolved in next(line for line in message.splitlines() if words in line)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_strides_are_compared_even_where_only_the_encoder_transfers(tiny_plans, tiny_network, pretraining_checkpoint):
    """Encoders with other strides have weights of the same shapes, so shapes alone would let them pass."""
    network = tiny_network(tiny_plans(strides=[[1, 1, 1], [1, 2, 2], [2, 2, 2]]))
    with pytest.raises(ValueError, match="strides: pretrained with"):
        load_pretrained(network, pretraining_checkpoint(tiny_plans(), transfers=("encoder",)))


def test_other_architecture_is_refused(tiny_plans, tiny_network, pretraining_checkpoint):
    network = tiny_network(tiny_plans("ResidualEncoderUNet"))
    with pytest.raises(ValueError, match="architecture class: pretrained with PlainConvUNet") as caught:
        load_pretrained(network, pretraining_checkpoint(tiny_plans("PlainConvUNet")))
    # The first three tensors are named, the others counted.
    assert str(caught.value).count("is missing in the checkpoint") == 3
    assert re.search(r"is missing in the checkpoint \(and \d+ more\)", str(caught.value))


def test_other_plans_of_the_same_dataset_need_no_moving(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration
):
    target = tiny_plans(features_per_stage=[4, 4, 4])
    target["plans_name"] = "nnUNetResEncUNetMPlans"
    with pytest.raises(ValueError) as caught:
        load_pretrained(tiny_network(target), pretraining_checkpoint(tiny_plans()), target, configuration)
    assert "align-plans" not in str(caught.value)
    assert "nnUNetv2_train 801 3d_fullres FOLD -p nnUNetPlans " in str(caught.value)


def test_layers_that_the_network_does_not_have_are_refused(tiny_plans, tiny_network):
    weights = tiny_network(tiny_plans(), classes=3).state_dict()
    network = tiny_network(tiny_plans(n_conv_per_stage=[1, 2, 2]), seed=3)
    before = snapshot(network)
    surplus = r"encoder\.stages\.0\.0\.convs\.1\.conv\.weight is in the checkpoint, but not in this network"
    with pytest.raises(ValueError, match=surplus):
        load_pretrained(network, {"network_weights": weights})
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_weights_that_did_not_arrive_are_noticed(tiny_plans, tiny_network, pretraining_checkpoint):
    """Two parameters of one memory: the second that is loaded overwrites the first."""
    network = tiny_network(tiny_plans())
    norm = network.encoder.stages[1][0].convs[0].norm
    norm.bias.data = norm.weight.data
    with pytest.raises(RuntimeError, match="differs from the pretrained weights after loading"):
        load_pretrained(network, pretraining_checkpoint(tiny_plans()))


def test_broken_values_are_refused(tiny_plans, tiny_network, pretraining_checkpoint):
    plans = tiny_plans()
    checkpoint = pretraining_checkpoint(plans)
    checkpoint["network_weights"]["encoder.stages.1.0.convs.0.norm.weight"][0] = float("nan")
    with pytest.raises(ValueError, match=r"stages\.1\.0\.convs\.0\.norm\.weight holds NaN"):
        load_pretrained(tiny_network(plans), checkpoint)


def test_nnunet_command_uses_the_reporting_loader_once(
    tiny_plans, tiny_network, pretraining_checkpoint, configuration, tmp_path
):
    from nnunetv2.run import run_training

    plans = tiny_plans()
    path = tmp_path / "checkpoint_final.pth"
    checkpoint = pretraining_checkpoint(plans, transfers=("encoder",))
    save_checkpoint_atomically(checkpoint, path)

    class Trainer:
        was_initialized = False
        reports: list[TransferReport] = []

        def initialize(self):
            self.network = tiny_network(plans)
            self.before = snapshot(self.network)
            self.was_initialized = True
            use_reporting_loader(plans, configuration, log=self.reports.append)

    stock = run_training.load_pretrained_weights
    trainer = Trainer()
    run_training.maybe_load_checkpoint(trainer, False, False, str(path))
    assert run_training.load_pretrained_weights is stock
    message = str(trainer.reports[0])
    assert "tensors loaded" in message and "STC3D, 7 epochs" in message
    after = trainer.network.state_dict()
    # The stock loader would have taken the untrained decoder too.
    assert torch.equal(after["decoder.transpconvs.0.weight"], trainer.before["decoder.transpconvs.0.weight"])
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(after[name], checkpoint["network_weights"][name])


def test_unused_reporting_loader_does_not_stack_up(tiny_plans, configuration):
    from nnunetv2.run import run_training

    stock = run_training.load_pretrained_weights
    try:
        use_reporting_loader(tiny_plans(), configuration)
        second = use_reporting_loader(tiny_plans(), configuration)
        assert run_training.load_pretrained_weights is second
        assert second.replaces is stock
    finally:
        run_training.load_pretrained_weights = stock


def test_nnunet_without_that_name_changes_nothing(tiny_plans, configuration, monkeypatch):
    from nnunetv2.run import run_training

    monkeypatch.delattr(run_training, "load_pretrained_weights")
    assert use_reporting_loader(tiny_plans(), configuration) is None
    assert not hasattr(run_training, "load_pretrained_weights")


def test_stock_loader_accepts_a_pretraining_checkpoint(
    tiny_plans, tiny_network, pretraining_checkpoint, architecture, tmp_path
):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    plans = tiny_plans(architecture)
    checkpoint = pretraining_checkpoint(plans)
    save_checkpoint_atomically(checkpoint, tmp_path / "checkpoint_final.pth")
    network = tiny_network(plans)
    load_pretrained_weights(network, str(tmp_path / "checkpoint_final.pth"))
    for name, tensor in network.state_dict().items():
        assert ".seg_layers." in name or torch.equal(tensor, checkpoint["network_weights"][name])
