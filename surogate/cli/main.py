"""`surogate`: the command line. Commands import what they need when they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from surogate.cli import jobs_commands, rollouts_commands, service_commands
from surogate.cli.rewards import env_commands, reward_commands
from surogate.errors import SurogateError

app = typer.Typer(
    name="surogate",
    help="Pretraining, fine-tuning and GRPO of language models as four gRPC services.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted. Tokens and TLS for --server come from "
    "SUROGATE_TOKEN, SUROGATE_TOKEN_FILE, SUROGATE_TLS_CA and their like.",
)

Server = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        "--server",
        metavar="HOST:PORT",
        envvar="SUROGATE_SERVER",
        help="Submit to this orchestrator. Without it the job runs on this machine and ends with this command.",
        show_default=False,
    ),
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the configuration; may be repeated."),
]
Follow = Annotated[bool, typer.Option("--follow/--detach", help="Follow the job, or only submit it (needs --server).")]
JobId = Annotated[str, typer.Option(help="Id for the job: lowercase letters, digits, hyphens.", show_default=False)]
Labels = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--label", metavar="KEY=VALUE", help="Label to keep with the job; may be repeated."),
]
OutputDir = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--output-dir", help="Folder for outputs; overrides output_dir.", show_default=False),
]
ClusterFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--cluster", help="cluster.yaml: what the job's pods get on Kubernetes.", show_default=False),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="train.yaml of the job.", show_default=False)]


@app.command(rich_help_panel="Training")
def pt(
    config: ConfigFile,
    server: Server = None,
    overrides: Overrides = None,
    follow: Follow = True,
    job_id: JobId = "",
    labels: Labels = None,
    output_dir: OutputDir = None,
    cluster: ClusterFile = None,
) -> None:
    """Pretrain, or go on pretraining, on raw text."""
    _launch("pt", _given(train=config, cluster=cluster), server, overrides, follow, job_id, labels, output_dir)


@app.command(rich_help_panel="Training")
def sft(
    config: ConfigFile,
    server: Server = None,
    overrides: Overrides = None,
    follow: Follow = True,
    job_id: JobId = "",
    labels: Labels = None,
    output_dir: OutputDir = None,
    cluster: ClusterFile = None,
) -> None:
    """Fine-tune on instructions or conversations, all weights or a LoRA adapter."""
    _launch("sft", _given(train=config, cluster=cluster), server, overrides, follow, job_id, labels, output_dir)


@app.command(rich_help_panel="Training")
def grpo(
    train: Annotated[Path, typer.Option(help="train.yaml: the trainer's side.", show_default=False)],
    infer: Annotated[Path, typer.Option(help="infer.yaml: the sampler's side.", show_default=False)],
    orch: Annotated[Path, typer.Option(help="orch.yaml: prompts, rewards, steps.", show_default=False)],
    server: Server = None,
    overrides: Overrides = None,
    follow: Follow = True,
    job_id: JobId = "",
    labels: Labels = None,
    output_dir: OutputDir = None,
    cluster: ClusterFile = None,
) -> None:
    """Train by reinforcement learning with group-relative advantages.

    Keys of --set begin with the file: train.learning_rate=1e-5, infer.dp=2, orch.max_steps=10.
    """
    files = _given(train=train, infer=infer, orch=orch, cluster=cluster)
    _launch("grpo", files, server, overrides, follow, job_id, labels, output_dir)


jobs_commands.add_to(app)
rollouts_commands.add_to(app)
env_commands.add_to(app)
reward_commands.add_to(app)
service_commands.add_to(app)


def _given(**files: Path | None) -> dict[str, Path]:
    return {name: file for name, file in files.items() if file is not None}


def _launch(
    kind: str,
    files: dict[str, Path],
    server: str | None,
    overrides: list[str] | None,
    follow: bool,
    job_id: str,
    labels: list[str] | None,
    output_dir: str | None,
) -> None:
    from surogate.cli.train import TrainCommand

    command = TrainCommand(
        kind=kind,
        files=files,
        overrides=tuple(overrides or ()),
        server=server,
        detach=not follow,
        job_id=job_id,
        labels=tuple(labels or ()),
        output_dir=output_dir,
    )
    raise typer.Exit(command.run())


def main() -> None:
    """Runs the command line and exits with its code."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # what gRPC says of each attempt is in our own errors, once
    try:
        app()
    except SurogateError as error:
        from surogate.cli.exits import report

        sys.exit(report(error))
    except BrokenPipeError:
        # Whoever read our output (`| head`) has had enough.
        sys.stderr.close()
        sys.exit(1)


if __name__ == "__main__":
    main()
