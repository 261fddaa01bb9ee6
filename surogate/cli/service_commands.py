"""Commands that run a module of their own: `serve`, `merge`, `tokenize`; and `config check`, `version`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

_PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

config_app = typer.Typer(help="Look at configuration files.", no_args_is_help=True, pretty_exceptions_enable=False)


_SERVICES = ("trainer", "inference", "orchestrator", "reward")


def serve(
    context: typer.Context,
    service: Annotated[
        str, typer.Argument(metavar="|".join(_SERVICES), help="Which service to run.", show_default=False)
    ] = "",
) -> None:
    """Run one of the services in this process. All further flags are the service's: serve trainer --help."""
    # --help after the service's name is the service's; typer's own is off for that.
    if service in {"", "-h", "--help"}:
        sys.stdout.write(f"{context.get_help()}\n")
        return
    if service not in _SERVICES:
        raise typer.BadParameter(f"{service!r} is none of {', '.join(_SERVICES)}")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", f"{service}_svc", *context.args])  # noqa: S606


def merge(context: typer.Context) -> None:
    """Merge a LoRA adapter into its base model. The flags are those of the trainer's merge: merge --help."""
    command = [sys.executable, "-m", "trainer_svc.worker.commands.merge", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)  # noqa: S603


def tokenize(context: typer.Context) -> None:
    """Tokenize the data of a train.yaml into the cache and say what there is; --debug shows tokens beside labels."""
    command = [sys.executable, "-m", "trainer_svc.worker.commands.tokenize", *context.args]
    raise typer.Exit(subprocess.run(command, check=False).returncode)  # noqa: S603


@config_app.command("check")
def check(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="Any of train.yaml, infer.yaml, orch.yaml, cluster.yaml.")
    ],
    overrides: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, as the training commands do."),
    ] = None,
) -> None:
    """Validate files, together if they are those of a GRPO job, and print what they resolve to. Exits 2 if wrong."""
    from surogate.config.check import check_files

    report = check_files(files, overrides or [])
    sys.stdout.write(f"{report.render()}\n")
    raise typer.Exit(0 if report.ok else 2)


def version() -> None:
    """Print the version."""
    from importlib.metadata import version as installed

    sys.stdout.write(f"surogate {installed('surogate')}\n")


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    panel = "Services and tools"
    app.command(rich_help_panel=panel, context_settings=_PASS_ON, add_help_option=False)(serve)
    app.command(rich_help_panel=panel, context_settings=_PASS_ON, add_help_option=False)(merge)
    app.command(rich_help_panel=panel, context_settings=_PASS_ON, add_help_option=False)(tokenize)
    app.add_typer(config_app, name="config", rich_help_panel=panel)
    app.command(rich_help_panel=panel)(version)
