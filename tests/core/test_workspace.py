"""A process's memory of examples: what is kept, what goes first, and what is free again."""

from __future__ import annotations

import torch

from tests.halves import client


def test_examples_are_kept_while_there_is_room_and_what_was_written_to_makes_some() -> None:
    workspace, made = client("fedavg", "runtime.memory=320").workspace, list[int]()  # room for 10 MiB

    def given(who: int, mib: int = 4) -> torch.Tensor:
        def make() -> tuple[torch.Tensor, None]:
            made.append(who)
            return torch.zeros(mib * 2**18), None

        found: torch.Tensor = workspace.kept((who, "train"), make)[0]
        return found

    for who in (0, 1, 0, 2, 0):
        given(who)
    assert made == [0, 1, 2]  # 1, looked at longest ago, had to go
    given(1)
    assert made == [0, 1, 2, 1]
    assert workspace.written(1) == ""
    given(1).add_(1)
    assert workspace.written(1) == "the train examples"
    for who in (3, 0, 1):
        given(who)
    assert made == [0, 1, 2, 1, 3, 1]  # 3 had the place of what was written to
    for _ in range(2):
        given(4, 12)  # more than there is room for: alone, it stays
    assert made[6:] == [4]
