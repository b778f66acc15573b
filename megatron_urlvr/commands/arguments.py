"""Arguments that several commands take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Argument(help="A YAML config, or the folder of a run.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings laid over the file, such as run.steps=50.", metavar="KEY=VALUE"),
]
Checkpoint = Annotated[
    str | None, typer.Option(help="Checkpoint of the run, such as step_000050. Without it: model.path.")
]
StudyDryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the commands of what is not done yet, and run nothing.")
]
