"""The JobSet manifest, against the JobSet API's own schema and against what the program reads."""

import copy
import math
import pathlib
import re

import pydantic
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

import dsv3
from dsv3.parallel.clients import read_clients
from dsv3.parallel.mesh import parse_axes

ROOT = pathlib.Path(__file__).resolve().parents[2]


def manifest():
    return yaml.safe_load((ROOT / "deploy" / "jobset.yaml").read_text())


def check_schema(found):
    """Types and required fields by the models, unknown fields since the models drop them."""
    assert JobsetV1alpha2JobSet.from_dict(copy.deepcopy(found)).to_dict() == found


def job_of(found):
    return found["spec"]["replicatedJobs"][0]


def container_of(found):
    return job_of(found)["template"]["spec"]["template"]["spec"]["containers"][0]


def test_it_fits_the_schema():
    check_schema(manifest())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: m["spec"].update(maxRestarts=3),
        lambda m: m["spec"]["failurePolicy"].update(maxRestarts="many"),
        lambda m: job_of(m).pop("name"),
        lambda m: job_of(m)["template"]["spec"].update(completion=4),
        lambda m: container_of(m).update(command="python"),
        lambda m: container_of(m)["env"][0].update(valeu="x"),
        lambda m: container_of(m)["ports"][0].pop("containerPort"),
    ],
)
def test_the_schema_sees_what_is_wrong(spoil):
    found = manifest()
    spoil(found)
    with pytest.raises((AssertionError, pydantic.ValidationError)):
        check_schema(found)


def test_the_pods_find_each_other():
    found = manifest()
    job, container = job_of(found), container_of(found)
    spec = job["template"]["spec"]
    env = {entry["name"]: entry["value"] for entry in container["env"]}
    pods = spec["completions"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == pods and job["replicas"] == 1
    name, network = found["metadata"]["name"], found["spec"]["network"]
    assert network["enableDNSHostnames"] and network["publishNotReadyAddresses"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    hosts = tuple(f"{name}-{job['name']}-0-{i}.{network['subdomain']}:{ports['dtensor']}" for i in range(pods))
    for index in range(pods):
        client = read_clients(env | {"JOB_COMPLETION_INDEX": str(index)})
        assert (client.client, client.jobs, client.port) == (index, hosts, ports["watch"])


def test_the_command_is_one_of_the_program():
    python, program, *arguments = container_of(manifest())["command"]
    text = (ROOT / program).read_text()
    given = dict(argument.removeprefix("--").split("=") for argument in arguments)
    assert set(given) <= set(re.findall(r'flags\.DEFINE_\w+\(\s*"(\w+)"', text))
    sizes = parse_axes(given["mesh"])
    assert math.prod(sizes.values()) % job_of(manifest())["template"]["spec"]["completions"] == 0
    assert dsv3.preset(given["preset"]).moe.router.num_experts % sizes["expert"] == 0
