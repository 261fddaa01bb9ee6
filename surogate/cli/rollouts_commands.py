"""The `rollouts` commands: arguments only; `surogate.cli.rollouts` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

Folder = Annotated[Path, typer.Argument(metavar="OUTPUT_DIR", help="Output folder of a GRPO job.", show_default=False)]
First = Annotated[int, typer.Option("--from", metavar="STEP", min=0, help="First step.")]
Last = Annotated[Optional[int], typer.Option("--to", metavar="STEP", help="Last step.", show_default=False)]  # noqa: UP045
Env = Annotated[Optional[str], typer.Option("--env", metavar="NAME", help="Only this environment.", show_default=False)]  # noqa: UP045
Fate = Annotated[
    Optional[Literal["trained", "zero_signal", "surplus"]],  # noqa: UP045
    typer.Option(help="Only rollouts that were trained on, or those that were not.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, an object a line.")]

rollouts_app = typer.Typer(
    help="Look at the rollouts that a GRPO job stored, export them, and score them again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@rollouts_app.command("list")
def list_(
    output_dir: Folder,
    sort: Annotated[Literal["newest", "best", "worst"], typer.Option(help="Which come first.")] = "newest",
    limit: Annotated[int, typer.Option(min=1, help="Most rollouts to print.")] = 20,
    first: First = 0,
    last: Last = None,
    env: Env = None,
    fate: Fate = None,
    as_json: Json = False,
) -> None:
    """List rollouts: the newest, or those with the best or worst rewards."""
    from surogate.cli import rollouts

    chosen = rollouts.Selection(first, last, env, fate)
    raise typer.Exit(rollouts.list_rollouts(output_dir, chosen, sort=sort, limit=limit, as_json=as_json))


@rollouts_app.command("show")
def show(
    output_dir: Folder,
    rollout: Annotated[str, typer.Argument(metavar="ROLLOUT", help="Id of the rollout.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show one rollout whole."""
    from surogate.cli import rollouts

    raise typer.Exit(rollouts.show_rollout(output_dir, rollout, as_json=as_json))


@rollouts_app.command("export")
def export(
    output_dir: Folder,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .jsonl, .csv or .parquet file to write.", show_default=False)
    ],
    first: First = 0,
    last: Last = None,
    env: Env = None,
    fate: Fate = None,
) -> None:
    """Write rollouts into one file."""
    from surogate.cli import rollouts

    raise typer.Exit(rollouts.export_rollouts(output_dir, file, rollouts.Selection(first, last, env, fate)))


@rollouts_app.command("rescore")
def rescore(
    output_dir: Folder,
    environment: Annotated[str, typer.Option("--with", metavar="ID", help="Environment to score with.")],
    address: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HOST:PORT", help="Reward service; unset: the built-in one.", show_default=False),
    ] = None,
    args: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Argument of the environment; may be repeated."),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Parquet file for the rollouts and their new rewards.", show_default=False),
    ] = None,
    item_timeout: Annotated[float, typer.Option(min=1.0, help="Seconds that one rollout may take.")] = 60.0,
    first: First = 0,
    last: Last = None,
    env: Env = None,
    fate: Fate = None,
    as_json: Json = False,
) -> None:
    """Score stored rollouts again with another reward, and say how far the two agree."""
    from surogate.cli import rescore as command
    from surogate.cli.rollouts import Selection
    from surogate.config.load import Document
    from surogate.config.overrides import apply_overrides

    arguments = dict(apply_overrides(Document("args", {}), args or []).data)
    reward = command.NewReward(address, environment, arguments, item_timeout)
    chosen = Selection(first, last, env, fate)
    raise typer.Exit(command.rescore(output_dir, chosen, reward, output, as_json=as_json))


def add_to(app: typer.Typer) -> None:
    """Adds `rollouts …`."""
    app.add_typer(rollouts_app, name="rollouts", rich_help_panel="Jobs and models")
