"""The adaptation plan: complete, plain and true for the state dict."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl_stc3d.transfer.adaptation_plan import build_adaptation_plan, resolve_configuration, unwrap
from nnssl_stc3d.transfer.differences import PlansReference, describe_plans

# What nnU-Net's repository reads from a checkpoint.
FIELDS = {
    "architecture_plans",
    "pretrain_plan",
    "pretrain_num_input_channels",
    "recommended_downstream_patchsize",
    "key_to_encoder",
    "key_to_stem",
    "keys_to_in_proj",
    "key_to_lpe",
}


def test_plan_names_existing_weights(tiny_plans, tiny_network, configuration, architecture, tmp_path):
    plans = tiny_plans(architecture, channels=2)
    network = tiny_network(plans, channels=2)
    plan = build_adaptation_plan(plans, configuration, 2, network)
    weights = network.state_dict()
    assert set(plan) == FIELDS
    for key in plan["keys_to_in_proj"]:
        assert weights[f"{key}.weight"].shape[1] == 2
    stem = "encoder.stages.0" if architecture == "PlainConvUNet" else "encoder.stem"
    assert (plan["key_to_encoder"], plan["key_to_stem"], plan["key_to_lpe"]) == ("encoder.stages", stem, None)
    assert any(key.startswith(stem + ".") for key in weights)
    torch.save(plan, tmp_path / "plan.pth")
    assert torch.load(tmp_path / "plan.pth", weights_only=True) == plan


def test_network_can_be_rebuilt_from_the_plan_alone(tiny_plans, tiny_network, configuration, architecture):
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    plans = tiny_plans(architecture)
    network = tiny_network(plans)
    plan = build_adaptation_plan(plans, configuration, 1, network)
    rebuilt = get_network_from_plans(
        plan["architecture_plans"]["arch_class_name"],
        plan["architecture_plans"]["arch_kwargs"],
        plan["architecture_plans"]["arch_kwargs_requiring_import"],
        plan["pretrain_num_input_channels"],
        3,
    )
    rebuilt.load_state_dict(network.state_dict())
    assert next(iter(plan["pretrain_plan"]["configurations"].values()))["patch_size"] == [16, 16, 16]


def test_inherited_configuration_is_resolved(tiny_plans):
    plans = tiny_plans()
    plans["configurations"]["small"] = {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]}
    resolved = resolve_configuration(plans, "small")
    assert resolved["patch_size"] == [8, 8, 8]
    assert resolved["spacing"] == [1.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"no usable configuration 2d.*3d_fullres"):
        resolve_configuration(plans, "2d")


def old_form(plans, configuration):
    """The same plans as nnU-Net wrote them before it had an entry for the architecture."""
    entry = plans["configurations"][configuration]
    kwargs = entry.pop("architecture")["arch_kwargs"]
    entry["UNet_class_name"], entry["num_pool_per_axis"] = "PlainConvUNet", [2, 2, 2]
    entry["UNet_base_num_features"] = kwargs["features_per_stage"][0]
    entry["unet_max_num_features"] = kwargs["features_per_stage"][-1]
    for old, new in (
        ("conv_kernel_sizes", "kernel_sizes"),
        ("pool_op_kernel_sizes", "strides"),
        ("n_conv_per_stage_encoder", "n_conv_per_stage"),
        ("n_conv_per_stage_decoder", "n_conv_per_stage_decoder"),
    ):
        entry[old] = kwargs[new]
    return plans


def test_old_plans_have_the_architecture_that_nnunet_gives_them(tiny_plans, tiny_network, configuration):
    plans, old = tiny_plans(), old_form(tiny_plans(), configuration)
    found = resolve_configuration(old, configuration)["architecture"]
    wanted = plans["configurations"][configuration]["architecture"]
    assert found["network_class_name"] == wanted["network_class_name"]
    assert {key: found["arch_kwargs"][key] for key in ("n_stages", "strides", "features_per_stage")} == {
        key: wanted["arch_kwargs"][key] for key in ("n_stages", "strides", "features_per_stage")
    }
    assert "architecture" not in old["configurations"][configuration]
    new, kept = (describe_plans(PlansReference(content, configuration)) for content in (plans, old))
    assert new == kept
    assert set(build_adaptation_plan(old, configuration, 1, tiny_network(plans))) == FIELDS


def test_wrong_channels_are_refused(tiny_plans, tiny_network, configuration):
    plans = tiny_plans()
    with pytest.raises(ValueError, match="says 3 input channels, but .* has 1"):
        build_adaptation_plan(plans, configuration, 3, tiny_network(plans))


def test_network_of_other_plans_is_refused(tiny_plans, tiny_network, configuration):
    network = tiny_network(tiny_plans("ResidualEncoderUNet"))
    with pytest.raises(ValueError, match="PlainConvUNet, but the network is a ResidualEncoderUNet"):
        build_adaptation_plan(tiny_plans("PlainConvUNet"), configuration, 1, network)


def test_architecture_without_keys_is_not_supported(tiny_plans, configuration):
    plans = tiny_plans()
    plans["configurations"][configuration]["architecture"]["network_class_name"] = "torch.nn.Sequential"
    with pytest.raises(NotImplementedError, match="Sequential does not declare key_to_encoder"):
        build_adaptation_plan(plans, configuration, 1, nn.Sequential())


def test_compiled_network_is_unwrapped(tiny_plans, tiny_network):
    network = tiny_network(tiny_plans())
    assert unwrap(torch.compile(network)) is network
    assert unwrap(network) is network
