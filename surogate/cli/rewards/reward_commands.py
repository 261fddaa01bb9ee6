"""The `reward` commands: arguments only; `surogate.cli.rewards.reward` does the work."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

reward_app = typer.Typer(
    help="Help for those who write reward services.", no_args_is_help=True, pretty_exceptions_enable=False
)


@reward_app.command("check")
def check(
    address: Annotated[str, typer.Argument(metavar="HOST:PORT", help="The reward service.", show_default=False)],
    env: Annotated[
        Optional[str],  # noqa: UP045 - typer reads the annotation at run time
        typer.Option("--env", metavar="ID", help="Only this environment; unset: all.", show_default=False),
    ] = None,
    args: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Argument of the environment; may be repeated."),
    ] = None,
    item_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one rollout may take.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
) -> None:
    """Ask a reward service, in any language, whatever jobs ask, and say what is wrong, where, and what to do.

    Exits 0 if jobs can use it, 1 if not, 2 for wrong flags. Advice does not count as wrong.
    """
    from surogate.cli.rewards import reward
    from surogate.config.load import Document
    from surogate.config.overrides import apply_overrides

    arguments = dict(apply_overrides(Document("args", {}), args or []).data)
    raise typer.Exit(reward.check(address, env, arguments, item_timeout, as_json=as_json))


def add_to(app: typer.Typer) -> None:
    """Adds `reward …`."""
    app.add_typer(reward_app, name="reward", rich_help_panel="Rewards")
