"""The learning rate of every step."""

from __future__ import annotations

from math import cos, pi

import pytest
import torch

from nnssl_stc3d.training.schedule import WarmupSchedule


def make(steps=250, epochs=400, warmup=100, shape="cosine", groups=1):
    parameters = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(groups)]
    optimizer = torch.optim.SGD(parameters, lr=123.0)
    return WarmupSchedule(optimizer, 1e-3, steps, epochs, warmup, shape), optimizer


def test_the_papers_schedule():
    """A.3.2: 100k steps, warm-up of 100 to 1e-3, cosine to zero."""
    schedule, _ = make()
    assert schedule.total == 100_000 and schedule.warmup == 100
    assert schedule.learning_rate(0) == pytest.approx(1e-5)
    assert schedule.learning_rate(49) == pytest.approx(5e-4)
    assert schedule.learning_rate(99) == pytest.approx(1e-3)
    assert schedule.learning_rate(100) == pytest.approx(1e-3)
    assert schedule.learning_rate(100 + 99_900 // 2) == pytest.approx(5e-4)
    assert schedule.learning_rate(100 + 99_900 // 4) == pytest.approx(1e-3 * 0.5 * (1 + cos(pi / 4)), rel=1e-4)
    assert 0 < schedule.learning_rate(99_999) < 1e-10
    assert schedule.learning_rate(100_000) == 0
    assert schedule.learning_rate(200_000) == 0


def test_it_never_rises_after_the_warm_up_nor_falls_before():
    schedule, _ = make(steps=10, epochs=30, warmup=20)
    rates = [schedule.learning_rate(i) for i in range(301)]
    assert rates[:20] == sorted(rates[:20])
    assert rates[19:] == sorted(rates[19:], reverse=True)
    assert max(rates) == pytest.approx(1e-3)


def test_a_constant_schedule_stays_at_its_peak():
    schedule, _ = make(shape="constant")
    assert schedule.learning_rate(0) == pytest.approx(1e-5)
    assert {schedule.learning_rate(i) for i in (100, 5_000, 99_999)} == {1e-3}


def test_a_short_training_still_reaches_its_peak():
    schedule, _ = make(steps=10, epochs=5)
    assert schedule.warmup == 5
    assert max(schedule.learning_rate(i) for i in range(50)) == pytest.approx(1e-3)


@pytest.mark.parametrize("warmup", [0, 100])
def test_a_training_of_a_single_step_works(warmup):
    schedule, optimizer = make(steps=1, epochs=1, warmup=warmup)
    schedule.step(0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)
    schedule.advance()
    assert schedule.progress == 1


def test_every_parameter_group_follows_step_by_step_and_epoch_by_epoch():
    schedule, optimizer = make(steps=10, epochs=40, warmup=20, groups=2)
    schedule.step(3)
    for iteration in range(30, 35):
        assert schedule.iteration == iteration
        assert schedule.progress == pytest.approx(iteration / 400)
        assert [g["lr"] for g in optimizer.param_groups] == [schedule.learning_rate(iteration)] * 2
        schedule.advance()


def test_ten_steps_lead_to_the_next_epoch():
    """A resumed run calls ``step`` where the uninterrupted one had advanced."""
    schedule, optimizer = make(steps=10, epochs=40, warmup=20)
    schedule.step(0)
    for _ in range(10):
        schedule.advance()
    advanced = optimizer.param_groups[0]["lr"]
    schedule.step(1)
    assert optimizer.param_groups[0]["lr"] == advanced


def test_progress_ends_at_one():
    schedule, _ = make(steps=2, epochs=2)
    for _ in range(9):
        schedule.advance()
    assert schedule.progress == 1


def test_the_weight_decay_rises_along_a_cosine():
    """Alice as released: .04, .22 in the middle, .4; set for every step, whatever a checkpoint's optimiser held."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0, weight_decay=0.04)
    schedule = WarmupSchedule(optimizer, 1e-3, 10, 10, 0, "cosine", weight_decay_end=0.4)
    for iteration, expected in ((0, 0.04), (25, 0.04 + 0.36 * 0.5 * (1 - cos(pi / 4))), (50, 0.22), (100, 0.4)):
        optimizer.param_groups[0]["weight_decay"] = 7.0
        schedule.iteration = iteration - 1
        schedule.advance()
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected, rel=1e-9)


def test_without_an_end_the_weight_decay_is_left_alone():
    schedule, optimizer = make()
    optimizer.param_groups[0]["weight_decay"] = 0.3
    schedule.advance()
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
