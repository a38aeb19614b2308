"""Options that commands share: the settings of every command, and how a file of events is written.

Beside the way of an event: cli.py registers its commands with `command`, which hands them the settings as `Given`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stream.loading import Loaded

CONFIG_FILE = "config.toml"

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        envvar="DRIFTLINE_CONFIG",
        help="Settings file; without it ./config.toml where there is one.",
        rich_help_panel="Settings",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="One setting, e.g. worker.slot=1; repeat it.", rich_help_panel="Settings"
    ),
]
TransportOption = Annotated[
    str | None,
    typer.Option("--transport", metavar="embedded|kafka", help="Which log.", rich_help_panel="Settings"),
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """The settings as given on the command line; a command's first argument."""

    config: Path | None = None
    sets: tuple[str, ...] = ()

    def load(self, *more: str) -> Loaded:
        """The effective settings; `more` are assignments that a command's own options make."""
        from stream.loading import load

        path = self.config
        if path is None and Path(CONFIG_FILE).is_file():
            path = Path(CONFIG_FILE)
        return load(path, [*self.sets, *more])

    def plus(self, *more: str) -> Given:
        """The same with more assignments, for processes of its own too."""
        return replace(self, sets=(*self.sets, *more))

    def arguments(self) -> list[str]:
        """The same settings for a process of its own."""
        config = [] if self.config is None else ["--config", str(self.config)]
        return config + [part for assignment in self.sets for part in ("--set", assignment)]


def command(target: typer.Typer, name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a command that takes `Given` first, and give it the options that make one.

    Options of the same name before the command (`driftline --transport kafka run`) count too; those after it win.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]

        @functools.wraps(function)
        def call(
            ctx: typer.Context, config: Path | None, sets: list[str] | None, transport: str | None, **options: Any
        ) -> Any:
            first: Given = ctx.find_root().obj or Given()
            given = Given(
                config=config or first.config,
                sets=(*first.sets, *transport_set(transport), *(sets or ())),
            )
            return function(given, **options)

        kind = inspect.Parameter.KEYWORD_ONLY
        shared = [
            inspect.Parameter("ctx", kind, annotation=typer.Context),
            inspect.Parameter("config", kind, annotation=ConfigOption, default=None),
            inspect.Parameter("sets", kind, annotation=SetOption, default=None),
            inspect.Parameter("transport", kind, annotation=TransportOption, default=None),
        ]
        parameters = [*(p.replace(kind=kind) for p in own), *shared]
        call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        target.command(name)(call)
        return function

    return register


def transport_set(transport: str | None) -> tuple[str, ...]:
    """--transport as an assignment."""
    return () if transport is None else (f"transport={transport}",)


def initial_set(folder: Path | None) -> tuple[str, ...]:
    """--initial-weights as an assignment."""
    return () if folder is None else (f"learner.initial_weights={folder}",)


InitialOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Start from this checkpoint of `driftline pretrain` while the weights topic is empty; "
        "learner.initial_weights.",
    ),
]
MapOption = Annotated[
    str, typer.Option("--map", metavar="FIELD=COLUMN,...", help="user=COL,interest=COL,time=COL[,type=,item=,...].")
]
HeaderOption = Annotated[bool, typer.Option("--header/--no-header", help="Without, columns are 0, 1, 2, ...")]
SepOption = Annotated[str | None, typer.Option("--sep", help="Of the columns; found out when clear.")]
UnitOption = Annotated[
    str | None, typer.Option("--time-unit", metavar="s|ms|iso|PATTERN|order", help="Found out when clear.")
]
StartOption = Annotated[
    str,
    typer.Option(
        "--from",
        metavar="earliest|latest|AGE|TIME",
        help="Where a new application begins: an age as 2h, a time as 2026-11-01T00:00:00Z.",
    ),
]
SortOption = Annotated[bool, typer.Option("--sort", help="Sort by time first (holds the file in memory).")]
EncodingOption = Annotated[str, typer.Option("--encoding", help="Of the text.")]
UsersOption = Annotated[
    str | None,
    typer.Option("--users", metavar="A-B", help="Only this share of the users, by a hash: 0-0.5 and 0.5-1 are halves."),
]
