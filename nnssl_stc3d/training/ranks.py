"""What the ranks of a training on several GPUs share."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import distributed as dist

ValueT = TypeVar("ValueT")


def rank_and_ranks(trainer: Any) -> tuple[int, int]:
    """A trainer's rank, and how many there are."""
    return trainer.local_rank, dist.get_world_size() if trainer.is_ddp else 1


def from_all_ranks(trainer: Any, values: list[ValueT]) -> list[ValueT]:
    """The values of all ranks, on every rank, in the order of the ranks. All have to call it."""
    if not trainer.is_ddp:
        return values
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return [value for of_rank in gathered for value in of_rank]
