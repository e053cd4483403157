"""The EMA teacher: starts equal, follows slowly, gets no gradient, and is a submodule like any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnssl_stc3d.modules.ema import EMATeacher


def student() -> nn.ModuleDict:
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    return nn.ModuleDict(
        {"first": shared, "second": nn.Sequential(shared, nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2))}
    )


def test_the_teacher_starts_as_a_copy_of_its_own():
    original = student()
    teacher = EMATeacher(original)
    for slow, fast in zip(teacher.module.parameters(), original.parameters(), strict=True):
        assert torch.equal(slow, fast) and slow.data_ptr() != fast.data_ptr() and fast.requires_grad
    assert not any(p.requires_grad for p in teacher.parameters())
    assert teacher.module["first"] is teacher.module["second"][0]


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_an_update_moves_every_weight_once(momentum):
    original = student()
    teacher = EMATeacher(original)
    before = [p.clone() for p in teacher.module.parameters()]
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(torch.randn_like(parameter))
    teacher.update(original, momentum)
    for slow, old, fast in zip(teacher.module.parameters(), before, original.parameters(), strict=True):
        torch.testing.assert_close(slow, momentum * old + (1 - momentum) * fast)
        assert not slow.requires_grad


def test_buffers_are_copied():
    original = student()
    teacher = EMATeacher(original)
    original["second"](torch.randn(8, 3))
    teacher.update(original, 0.9)
    for slow, fast in zip(teacher.module.buffers(), original.buffers(), strict=True):
        assert torch.equal(slow, fast)
    assert teacher.module["second"][1].num_batches_tracked == 1


def test_the_teacher_is_saved_and_resumed():
    teacher = EMATeacher(student())
    moved = student()
    with torch.no_grad():
        moved["first"].weight.add_(1)
    teacher.update(moved, 0.5)
    other = EMATeacher(student())
    other.load_state_dict(teacher.state_dict())
    assert torch.equal(other.module["first"].weight, teacher.module["first"].weight)
    assert not torch.equal(other.module["first"].weight, student()["first"].weight)


def test_the_student_is_not_registered_again():
    assert all(name.startswith("module.") for name in EMATeacher(student()).state_dict())


def test_bad_input_is_named():
    teacher = EMATeacher(student())
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\], got 1.5"):
        teacher.update(student(), 1.5)
    with pytest.raises(ValueError, match="shorter|longer"):
        teacher.update(nn.Linear(3, 3), 0.5)
