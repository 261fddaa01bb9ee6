"""The definition of TrainingJobs: current, structural, and as tolerant as the models that it is made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator_svc.trainingjobs.crd import definition, render
from surogate.config.job import resolve_job
from surogate.config.load import load_yaml
from tests.helpers.grpo.grpo_job import job_config
from tests.helpers.orchestrator import sft_config

ROOT = Path(__file__).parents[3]
PRESERVES = "x-kubernetes-preserve-unknown-fields"
[VERSION] = definition()["spec"]["versions"]
SCHEMA = VERSION["schema"]["openAPIV3Schema"]


def nodes(schema: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, inner in schema.get("properties", {}).items():
        yield from nodes(inner, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from nodes(schema[key], f"{path}[{key}]")


NODES = dict(nodes(SCHEMA))


def test_the_file_is_what_the_models_make() -> None:
    assert (ROOT / "k8s/base/crd.yaml").read_text() == render(), (
        "run: python -m orchestrator_svc.trainingjobs.crd > k8s/base/crd.yaml"
    )
    assert yaml.safe_load(render()) == definition()


def test_the_schema_is_structural() -> None:
    """The rules of the API server: a type everywhere or everything kept, no references, no unions with types."""
    known = "type description properties required items additionalProperties enum nullable format minimum maximum"
    known += f" exclusiveMinimum exclusiveMaximum minLength {PRESERVES} x-kubernetes-list-type"
    for path, node in NODES.items():
        assert set(node) <= {*known.split(), "x-kubernetes-list-map-keys"}, path
        assert "type" in node or node.get(PRESERVES) is True, path
        assert not ("properties" in node and "additionalProperties" in node), path
        assert node.get("additionalProperties") is not False, path
        assert node.get("type") != "array" or "items" in node, path
        assert not ("enum" in node and node.get("nullable")), f"{path}: null would be none of the values"
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert isinstance(node.get(bound, True), bool), f"{path}: OpenAPI 3.0 has a flag there"
        assert "default" not in node, path


def test_every_property_of_a_configuration_says_what_it_is() -> None:
    bare = [path for path, node in NODES.items() if path.startswith(".spec.") and "." in path[6:]]
    assert all("description" in NODES[path] for path in bare if not path.endswith("]"))


def test_columns_and_the_scale_lead_somewhere() -> None:
    paths = [column["jsonPath"] for column in VERSION["additionalPrinterColumns"]]
    paths += list(VERSION["subresources"]["scale"].values())
    for path in paths:
        assert path in NODES or path == ".metadata.creationTimestamp", path


def test_nothing_is_written_that_an_api_server_does_not_keep() -> None:
    """Else every apply of the same file would change the definition, and GitOps would never be at rest."""
    assert all(column.get("priority") != 0 for column in VERSION["additionalPrinterColumns"])


def openapi(schema: Any) -> Any:
    """The schema as jsonschema has it."""
    if isinstance(schema, list):
        return [openapi(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: openapi(value) for key, value in schema.items()}
    for side in ("Minimum", "Maximum"):
        if found.pop(f"exclusive{side}", False) is True:
            found[f"exclusive{side}"] = found.pop(side.lower())
    if found.pop("nullable", False) is True:
        found["type"] = [found["type"], "null"]
    return found


GRPO = job_config("model", env=[{"id": "a", "args": {"x": 1}}, {"id": "b"}], report_to={"project": "p"})


@pytest.mark.parametrize(
    "spec",
    [
        sft_config(),
        sft_config(report_to="tensorboard", learning_rate=2e-4, lora=False, resume_from_checkpoint=True),
        {**GRPO, "inferenceReplicas": 2},
        {**sft_config(), "cluster": {"nodeSelector": {"a": "b"}, "trainer": {"resources": {"limits": {"cpu": 4}}}}},
        {**sft_config(), "train": {**sft_config()["train"], "lerning_rate": 1}},
    ],
)
def test_what_the_orchestrator_should_judge_passes(spec: Any) -> None:
    jsonschema.validate({"spec": spec}, openapi(SCHEMA))


@pytest.mark.parametrize(
    "spec",
    [
        {"kind": "rl", "train": {}},
        {"kind": "sft"},
        sft_config(gpus="many"),
        sft_config(datasets={}),
        {**sft_config(), "inferenceReplicas": 0},
    ],
)
def test_what_the_api_server_can_judge_does_not(spec: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"spec": spec}, openapi(SCHEMA))


@pytest.mark.parametrize("file", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda file: file.name)
def test_every_example_passes(file: Path) -> None:
    data = load_yaml(file).data  # YAML 1.2, as kubectl has it: 2e-4 is a number
    for part in ("train", "infer", "orch"):
        if file.stem.startswith(part) or (part == "train" and "datasets" in data):
            spec = {"kind": "grpo", "train": {}, part: data}
            jsonschema.validate({"spec": spec}, openapi(SCHEMA))


@pytest.mark.parametrize("file", sorted((ROOT / "k8s/examples").glob("*.yaml")), ids=lambda file: file.name)
def test_every_example_of_a_resource_is_a_job(file: Path) -> None:
    resource = load_yaml(file).data
    jsonschema.validate(resource, openapi(SCHEMA))
    spec = resource["spec"]
    job = resolve_job({part: spec[part] for part in ("kind", "train", "infer", "orch", "cluster") if part in spec})
    assert job.warnings == []
