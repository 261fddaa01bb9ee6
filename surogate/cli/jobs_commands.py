"""The `jobs` commands and `generate`: arguments only; `surogate.cli.jobs` and `surogate.cli.generate` do the work."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

Server = Annotated[
    str,
    typer.Option(
        "--server", metavar="HOST:PORT", envvar="SUROGATE_SERVER", help="The orchestrator.", show_default=False
    ),
]
Job = Annotated[str, typer.Argument(metavar="JOB", help="Id of the job, or its name jobs/ID.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: one object, or one a line where there are several.")]

jobs_app = typer.Typer(
    help="List, look at, follow and end the jobs of an orchestrator.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@jobs_app.command("list")
def list_(
    server: Server,
    state: Annotated[Optional[list[str]], typer.Option(help="Only jobs in this state; may be repeated.")] = None,  # noqa: UP045
    kind: Annotated[Optional[list[str]], typer.Option(help="Only pt, sft or grpo jobs; may be repeated.")] = None,  # noqa: UP045
    label: Annotated[Optional[list[str]], typer.Option(metavar="KEY=VALUE", help="Only jobs with this label.")] = None,  # noqa: UP045
    limit: Annotated[int, typer.Option(min=1, help="Most jobs to print.")] = 50,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    from surogate.cli import jobs

    raise typer.Exit(
        jobs.list_jobs(server, states=state or [], kinds=kind or [], labels=label or [], limit=limit, as_json=as_json)
    )


@jobs_app.command("get")
def get(job: Job, server: Server, as_json: Json = False) -> None:
    """Show one job."""
    from surogate.cli import jobs

    raise typer.Exit(jobs.get_job(server, job, as_json=as_json))


@jobs_app.command("watch")
def watch(
    job: Job,
    server: Server,
    after: Annotated[int, typer.Option(min=0, help="Begin after this event.")] = 0,
    as_json: Json = False,
) -> None:
    """Follow a job to its end. Exits 0 if it succeeded, 1 if not; interrupting it leaves the job alone."""
    from surogate.cli import jobs

    raise typer.Exit(jobs.watch_job(server, job, after_sequence=after, as_json=as_json))


@jobs_app.command("cancel")
def cancel(job: Job, server: Server) -> None:
    """Ask a job to stop; it saves what it can."""
    from surogate.cli import jobs

    raise typer.Exit(jobs.cancel_job(server, job))


@jobs_app.command("reward")
def reward(
    job: Job,
    server: Server,
    address: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The reward service; without it, the configured one again.")
    ] = "",
    env: Annotated[str, typer.Option(metavar="NAME", help="The environment, where the job has several.")] = "",
    shadow: Annotated[bool, typer.Option("--shadow", help="Score with it too, and only compare.")] = False,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS to it.")] = False,
    token_env: Annotated[str, typer.Option(metavar="VAR", help="The orchestrator's variable with its token.")] = "",
) -> None:
    """Replace the reward service of a running GRPO job, or compare another with it."""
    from surogate.cli import jobs

    raise typer.Exit(
        jobs.replace_reward(server, job, address, environment=env, shadow=shadow, tls=tls, token_env=token_env)
    )


@jobs_app.command("scale")
def scale(
    job: Job,
    server: Server,
    inference: Annotated[int, typer.Option(min=1, metavar="N", help="Inference replicas.", show_default=False)],
) -> None:
    """Give a running GRPO job more or fewer inference replicas."""
    from surogate.cli import jobs

    raise typer.Exit(jobs.scale_job(server, job, inference=inference))


@jobs_app.command("logs")
def logs(
    job: Job,
    server: Server,
    component: Annotated[
        str, typer.Option(metavar="NAME", help="trainer, inference, reward, or one such as inference-1; unset: all.")
    ] = "",
    tail: Annotated[int, typer.Option(min=1, max=10_000, help="Lines of each to begin with.")] = 100,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the workers have ended.")] = False,
) -> None:
    """Print the logs of a job's workers."""
    from surogate.cli import jobs

    raise typer.Exit(jobs.print_logs(server, job, component=component, tail=tail, follow=follow))


@jobs_app.command("delete")
def delete(job: Job, server: Server) -> None:
    """Forget an ended job; its files stay."""
    from surogate.cli import jobs

    raise typer.Exit(jobs.delete_job(server, job))


def generate(
    server: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT", envvar="SUROGATE_INFERENCE", help="The inference service.", show_default=False
        ),
    ],
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Argument(
            metavar="PROMPT", help="What to say. Without it: a conversation on a terminal, else standard input."
        ),
    ] = None,
    system: Annotated[Optional[str], typer.Option(help="System message.", show_default=False)] = None,  # noqa: UP045
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat template.")] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Most tokens to generate; unset: the context.", show_default=False),
    ] = None,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus mass; 1 is off.")] = 1.0,
    seed: Annotated[Optional[int], typer.Option(help="Seed of the sampler.", show_default=False)] = None,  # noqa: UP045
) -> None:
    """Talk to a served model."""
    from surogate.cli import generate as command
    from surogate.v1 import common_pb2

    sampling = common_pb2.SamplingParams(temperature=temperature, max_tokens=max_tokens, top_p=top_p, seed=seed)
    raise typer.Exit(command.generate(server, prompt, sampling, system=system, raw=raw))


def add_to(app: typer.Typer) -> None:
    """Adds `jobs …` and `generate`."""
    app.add_typer(jobs_app, name="jobs", rich_help_panel="Jobs and models")
    app.command(rich_help_panel="Jobs and models")(generate)
