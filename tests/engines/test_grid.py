"""What is pushed to a grid is there until it is pulled, in whatever parts that is done."""

from __future__ import annotations

from collections.abc import Iterator

from flwr.app import ConfigRecord, Message, RecordDict

from fedfuse.engines.grid import LocalGrid


class Echo(LocalGrid):
    def exchange(self, groups: list[list[Message]]) -> Iterator[Message]:
        for group in groups:
            yield from group


def test_messages_are_pushed_while_others_wait_to_be_pulled() -> None:
    grid = Echo(3)

    def message(node: int) -> Message:
        return Message(RecordDict({"config": ConfigRecord()}), dst_node_id=node, message_type="train")

    def nodes(keys: list[str]) -> list[int]:
        return [reply.metadata.dst_node_id for reply in grid.pull_messages(keys)]

    first, second = grid.push_messages([message(1), message(2)])
    assert nodes([first]) == [1]
    (third,) = grid.push_messages([message(3)])
    assert nodes([third, second]) == [2, 3]
    assert nodes([first, second, third]) == []
