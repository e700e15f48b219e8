"""One answer while it is written."""

from __future__ import annotations

from vlm.runtime.generation.events import Event, token_event
from vlm.runtime.generation.task import Task, Written
from vlm.runtime.generation.text import AnswerText


class Row(Written):
    """The answer to prompt `number` of a task; `name` is the row that its events say."""

    def __init__(self, task: Task, number: int, name: int | None = None) -> None:
        super().__init__(task.branches[number][0], [])
        self.name, self.key = number if name is None else name, task.keys[number]
        self.text = AnswerText(task.generator.text, task.decoding.stop)

    def take(self, token: int, eos_ids: frozenset[int], full: bool) -> Event:
        """The event of the next token; full: no other may follow it."""
        self.ids.append(token)
        return token_event(self.name, self.text, token, eos_ids, full)
