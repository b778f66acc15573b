"""Tasks that generate their own prompts, with exact checkers."""

from .base import Split, Task, TaskPrompt
from .registry import available, get_task

__all__ = ["Split", "Task", "TaskPrompt", "available", "get_task"]
