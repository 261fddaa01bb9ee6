"""The command line as a process, against a real gRPC server with a fake orchestrator behind it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import surogate
from surogate.errors import InternalError
from tests.helpers.fake_jobs import FakeOrchestrator, serving_jobs

PROGRAM = [sys.executable, "-m", "surogate.cli.main"]
CONFIG = {"kind": "sft", "train": {"model": "m"}}


def run(*arguments: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Runs `surogate ARGUMENTS` without a terminal."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SUROGATE_")} | env
    return subprocess.run([*PROGRAM, *arguments], input=stdin, capture_output=True, text=True, env=environment)


@pytest.fixture
def train_yaml(tmp_path: Path) -> str:
    path = tmp_path / "train.yaml"
    path.write_text("model: m\nlearning_rate: 1.0e-4\n")
    return str(path)


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    code = "import sys; sys.argv[1:] = ['--help']\nfrom surogate.cli.main import main\n"
    code += "try:\n    main()\nexcept SystemExit: pass\nprint(*{name.partition('.')[0] for name in sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *text, modules = ran.stdout.splitlines()
    for command in ("pt", "sft", "grpo", "jobs", "generate", "config", "merge", "serve", "version"):
        assert any(f"│ {command} " in line for line in text), command
    assert not {"torch", "vllm", "transformers", "sqlalchemy", "matplotlib", "grpc", "pydantic"} & set(modules.split())


def test_version() -> None:
    assert run("version").stdout.startswith("surogate 0.")


def test_list_get_cancel_delete() -> None:
    with serving_jobs(FakeOrchestrator()) as server:
        with surogate.Client(server) as client:
            client.create_job(CONFIG, job_id="one", labels={"team": "a"})
            client.create_job(CONFIG, job_id="two")
        listed = run("jobs", "list", "--server", server)
        assert listed.returncode == 0
        assert [line.split()[0] for line in listed.stdout.splitlines()] == ["JOB", "two", "one"]
        as_json = run("jobs", "list", "--json", "--limit", "1", SUROGATE_SERVER=server).stdout
        assert json.loads(as_json)["name"] == "jobs/two"
        got = run("jobs", "get", "one", "--server", server)
        assert "jobs/one" in got.stdout and "queued" in got.stdout
        assert json.loads(run("jobs", "get", "one", "--server", server, "--json").stdout)["state"] == "STATE_QUEUED"
        assert "3 inference replicas" in run("jobs", "scale", "one", "--server", server, "--inference", "3").stdout
        logs = run("jobs", "logs", "one", "--server", server, "--component", "trainer", "--follow", "--tail", "7")
        assert logs.stdout.splitlines() == ["trainer-0 | one", "trainer-0 | two"]
        replaced = run("jobs", "reward", "one", "--server", server, "--address", "new:50055", "--shadow")
        assert replaced.stdout == "jobs/one: the shadow is new:50055 from now on\n"
        assert run("jobs", "cancel", "one", "--server", server).stdout == "jobs/one: cancelled\n"
        assert run("jobs", "delete", "one", "--server", server).returncode == 0
        missing = run("jobs", "get", "one", "--server", server)
        assert (missing.returncode, missing.stderr) == (2, "error: no job jobs/one\n")


def test_watch_prints_steps_and_a_table() -> None:
    with serving_jobs(FakeOrchestrator(break_after=2)) as server:
        with surogate.Client(server) as client:
            client.create_job(CONFIG, job_id="one")
        watched = run("jobs", "watch", "one", "--server", server)
        assert watched.returncode == 0
        steps = [line for line in watched.stdout.splitlines() if line.startswith("step ")]
        assert [line.split()[1] for line in steps] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
        assert "succeeded" in watched.stdout
        events = run("jobs", "watch", "one", "--after", "3", "--json", "--server", server).stdout.splitlines()
        assert [json.loads(event)["sequence"] for event in events] == ["4", "5"]


def test_a_failed_job_is_exit_code_1() -> None:
    with serving_jobs(FakeOrchestrator(error=InternalError("the trainer is out of memory"))) as server:
        with surogate.Client(server) as client:
            client.create_job(CONFIG, job_id="one")
        watched = run("jobs", "watch", "one", "--server", server)
        assert watched.returncode == 1
        assert watched.stderr == "error: the trainer is out of memory\n"


def test_an_unreachable_server_says_what_to_try() -> None:
    ran = run("jobs", "list", "--server", "127.0.0.1:1")
    assert ran.returncode == 1
    assert "error: cannot reach the orchestrator at 127.0.0.1:1" in ran.stderr
    assert "surogate serve orchestrator" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["jobs", "list", "--state", "sleeping", "--server", "x:1"], "'sleeping' is none of queued, starting, running"),
        (["jobs", "list", "--label", "team", "--server", "x:1"], "--label: 'team' is not KEY=VALUE"),
        (["jobs", "get", "one"], "--server"),
        (["serve", "kitchen"], "none of trainer, inference, orchestrator, reward"),
        (["sft"], "Missing argument"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str], says: str) -> None:
    ran = run(*arguments)
    assert ran.returncode == 2
    assert says in ran.stderr
    assert "Traceback" not in ran.stderr


def test_generate_answers_a_prompt() -> None:
    with serving_jobs(FakeOrchestrator()) as server:
        assert run("generate", "hello there", "--server", server).stdout == "hello there \n"
        assert run("generate", "--server", server, stdin="from a pipe").stdout == "from a pipe \n"
        assert run("generate", "hi", "--system", "be brief", "--server", server).stdout == "be brief hi \n"
        assert run("generate", "hi", "--raw", SUROGATE_INFERENCE=server).stdout == "hi \n"


def test_serve_runs_the_service_with_its_flags() -> None:
    ran = run("serve", "reward", "--help")
    assert ran.returncode == 0 and "--item-timeout" in ran.stdout
    assert "Usage" in run("serve", "--help").stdout
    assert run("serve", "reward", "--workers", "0").returncode == 2
    assert run("merge", "--help").returncode == 0


def test_submits_with_overrides_and_detaches(train_yaml: str) -> None:
    fake = FakeOrchestrator()
    with serving_jobs(fake) as server:
        ran = run(
            *("sft", train_yaml, "--server", server, "--detach", "--job-id", "mine"),
            *("--set", "learning_rate=2e-5", "--set", "max_steps=7", "--label", "team=a", "--output-dir", "out"),
        )
        assert (ran.returncode, ran.stdout) == (0, "jobs/mine\n")
        train = fake.jobs["jobs/mine"].config["train"]
        assert dict(train) == {"model": "m", "learning_rate": 2e-5, "max_steps": 7, "output_dir": "out"}


def test_submits_the_three_files_of_grpo(tmp_path: Path, train_yaml: str) -> None:
    (tmp_path / "infer.yaml").write_text("model: m\n")
    (tmp_path / "orch.yaml").write_text("env:\n  - id: reverse-text\n")
    files = ["--train", train_yaml, "--infer", str(tmp_path / "infer.yaml"), "--orch", str(tmp_path / "orch.yaml")]
    fake = FakeOrchestrator()
    with serving_jobs(fake) as server:
        ran = run("grpo", *files, "--server", server, "--job-id", "g", "--set", "orch.max_steps=3")
        assert ran.returncode == 0, ran.stderr
        config = fake.jobs["jobs/g"].config
        assert config["kind"] == "grpo"
        assert config["orch"]["max_steps"] == 3
        wrong = run("grpo", *files, "--server", server, "--set", "max_steps=3")
        assert wrong.returncode == 2 and "must begin with one of train., infer., orch." in wrong.stderr


def test_what_the_server_refuses_is_named_by_key(tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text("modle: m\n")
    with serving_jobs(FakeOrchestrator()) as server:
        ran = run("sft", str(tmp_path / "train.yaml"), "--server", server)
    assert (ran.returncode, ran.stderr) == (
        2,
        f"error: {tmp_path}/train.yaml:1: train.modle: unknown key; did you mean model?\n",
    )


def test_detaching_needs_a_server(train_yaml: str) -> None:
    ran = run("sft", train_yaml, "--detach")
    assert ran.returncode == 2 and "needs --server" in ran.stderr


def test_interrupting_leaves_a_remote_job_alone(train_yaml: str) -> None:
    fake = FakeOrchestrator(endless=True)
    with serving_jobs(fake) as server:
        command = [*PROGRAM, "sft", train_yaml, "--server", server, "--job-id", "mine"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            assert any("step 5" in line for line in process.stdout)
            process.send_signal(signal.SIGINT)
            said = process.stderr.read()
        assert process.returncode == 130
        assert "jobs/mine goes on" in said and "surogate jobs cancel mine" in said
        with surogate.Client(server) as client:
            assert client.get_job("mine").state == 1
            client.cancel_job("mine")
