"""What importing the package costs, and what a client needs to know of configurations."""

import subprocess
import sys

import pytest

from surogate.client import job_config, job_name
from surogate.client.generate import generate_request
from surogate.errors import InvalidInputError
from surogate.structs import to_struct
from surogate.v1 import job_pb2

HEAVY = ("torch", "vllm", "transformers", "peft", "datasets", "sqlalchemy", "matplotlib")


def loaded_by(code: str) -> set[str]:
    """Names of top-level modules that are loaded after `code` ran in a fresh interpreter."""
    script = f"{code}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(ran.stdout.splitlines()[-1].split())


def test_the_package_itself_loads_nothing_else() -> None:
    assert not {*HEAVY, "grpc", "pydantic", "google"} & loaded_by("import surogate")


def test_the_client_loads_nothing_heavy() -> None:
    assert not set(HEAVY) & loaded_by("import surogate; surogate.Client")


def test_job_names() -> None:
    assert job_name("a") == job_name("jobs/a") == job_name(job_pb2.Job(name="jobs/a")) == "jobs/a"


def test_job_config_puts_the_parts_together() -> None:
    assert job_config("pt", {"model": "m"}) == {"kind": "pt", "train": {"model": "m"}}
    with pytest.raises(InvalidInputError, match="three parts"):
        job_config("grpo", {"model": "m"})
    with pytest.raises(InvalidInputError, match="one part"):
        job_config("sft", {"model": "m"}, infer={})


def test_prompts_of_every_form() -> None:
    assert generate_request("text").text == "text"
    assert list(generate_request([1, 2]).tokens.ids) == [1, 2]
    assert generate_request([{"role": "user", "content": "x"}]).conversation.messages[0].content == "x"
    with pytest.raises(InvalidInputError, match="empty"):
        generate_request("")
    with pytest.raises(InvalidInputError, match="role and content"):
        generate_request([{"content": "x"}])


def test_values_that_json_lacks_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="JSON"):
        to_struct({"train": {"model": object()}})
