"""The `env` commands: arguments only; `surogate.cli.rewards.env`, `env_scaffold` and `env_eval` do the work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

Address = Annotated[
    Optional[str],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(
        metavar="HOST:PORT",
        help="Reward service; unset: the built-in one, with what installed packages bring.",
        show_default=False,
    ),
]

env_app = typer.Typer(
    help="Write environments, list them, and try them on a served model.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@env_app.command("init")
def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Id of the environment, as in my-env.")],
    directory: Annotated[Path, typer.Option(help="Folder to make the package's folder in.")] = Path(),
) -> None:
    """Write a package with an environment: prompts, reward, entry point, test, README."""
    from surogate.cli.rewards import env_scaffold

    raise typer.Exit(env_scaffold.init(name, directory))


@env_app.command("list")
def list_(
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, an object a line.")] = False,
) -> None:
    """List environments: the built-in ones and those of installed packages."""
    from surogate.cli.rewards import env

    raise typer.Exit(env.list_environments(address, as_json=as_json))


@env_app.command("eval")
def eval_(
    environment: Annotated[str, typer.Argument(metavar="ENV", help="Id of the environment.", show_default=False)],
    inference: Annotated[
        str,
        typer.Option(
            "--inference",
            "--server",
            metavar="HOST:PORT",
            envvar="SUROGATE_INFERENCE",
            help="The served model.",
            show_default=False,
        ),
    ],
    address: Address = None,
    args: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Argument of the environment; may be repeated."),
    ] = None,
    split: Annotated[Literal["train", "eval"], typer.Option(help="Which prompts.")] = "eval",
    examples: Annotated[int, typer.Option("--examples", "-n", min=1, max=100_000, help="Most prompts.")] = 32,
    rollouts: Annotated[int, typer.Option(min=1, max=1024, help="Completions of each prompt.")] = 4,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    max_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Longest completion; unset: the context.", show_default=False),
    ] = None,
    max_turns: Annotated[int, typer.Option(min=1, help="Most turns of the model, where the environment answers.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Seed of prompts and sampling.")] = 0,
    item_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that one rollout may take to score.")] = 60.0,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show, from the worst to the best.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one object.")] = False,
) -> None:
    """Have a served model answer an environment's prompts, and say what rewards it earns."""
    from surogate.cli.rewards import env_eval
    from surogate.config.load import Document
    from surogate.config.overrides import apply_overrides

    wanted = env_eval.Evaluation(
        environment=environment,
        args=dict(apply_overrides(Document("args", {}), args or []).data),
        inference=inference,
        address=address,
        split=split,
        examples=examples,
        rollouts=rollouts,
        seed=seed,
        temperature=temperature,
        max_tokens=max_tokens,
        max_turns=max_turns,
        item_timeout=item_timeout,
    )
    raise typer.Exit(env_eval.evaluate(wanted, samples=samples, as_json=as_json))


def add_to(app: typer.Typer) -> None:
    """Adds `env …`."""
    app.add_typer(env_app, name="env", rich_help_panel="Rewards")
