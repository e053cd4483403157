"""MONAI's Swin-UNETR behind nnU-Net's constructor; without MONAI, what a user is told."""

from __future__ import annotations

import sys

import pytest
import torch

from nnssl_stc3d.modules.swin_unetr import PlansSwinUNETR

SMALL = {"feature_size": 12, "strides": [[1, 1, 1]] * 3}
IMAGE = (1, 2, 64, 32, 32)


def test_without_monai_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "monai.networks.nets", None)
    with pytest.raises(ImportError, match=r"needs MONAI 1.5 or newer.*pip install 'nnssl_stc3d\[monai\]'"):
        PlansSwinUNETR(1, 2, **SMALL)


@pytest.fixture
def network():
    pytest.importorskip("monai", minversion="1.5", reason="MONAI is optional: pip install 'nnssl_stc3d[monai]'")
    torch.manual_seed(0)
    return PlansSwinUNETR(2, 3, **SMALL).eval()


def test_it_computes_what_monais_network_does(network):
    from monai.networks.nets import SwinUNETR

    original = SwinUNETR(in_channels=2, out_channels=3, feature_size=12).eval()
    weights = {f"swin.{key}": value for key, value in original.state_dict().items()}
    weights = {key.replace("swin.out.", "decoder.seg_layers.0."): value for key, value in weights.items()}
    network.load_state_dict(weights)
    image = torch.randn(IMAGE)
    with torch.no_grad():
        expected, given = original(image), network(image)
        assert given.shape == (1, 3, *IMAGE[2:])
        torch.testing.assert_close(given, expected)
        # As nnU-Net's trainers switch it.
        network.decoder.deep_supervision = True
        (supervised,) = network(image)
        torch.testing.assert_close(supervised, expected)


def test_nnunet_builds_it_from_plans():
    pytest.importorskip("monai", minversion="1.5", reason="MONAI is optional: pip install 'nnssl_stc3d[monai]'")
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    name = "nnssl_stc3d.modules.swin_unetr.PlansSwinUNETR"
    built = get_network_from_plans(name, SMALL, [], 1, 2, allow_init=True, deep_supervision=False)
    assert isinstance(built, PlansSwinUNETR) and built.decoder.deep_supervision is False


def test_every_place_where_the_image_comes_in_is_named(network):
    weights = network.state_dict()
    named = {f"{key}.weight" for key in network.keys_to_in_proj}
    assert named == {key for key, value in weights.items() if value.ndim == 5 and value.shape[1] == IMAGE[1]}


def test_other_classes_and_channels_load_like_those_of_a_unet(network):
    from nnssl_stc3d.transfer.load import load_pretrained

    target = PlansSwinUNETR(4, 5, **SMALL)
    report = load_pretrained(target, {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainer"})
    assert len(report.adapted) == 3 and {name.rsplit(".", 3)[0] for name in report.fresh} == {"decoder.seg_layers.0"}
