"""cluster.yaml, checked by the code of Ray that `ray up` runs before it talks to a cloud."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).parent.parent


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def validate(cluster: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    prepared = validate(cluster)
    gpu = prepared["available_node_types"]["gpu"]
    assert gpu["min_workers"] == 0
    assert gpu["resources"]["GPU"] == 1
    assert gpu["max_workers"] <= prepared["max_workers"]
    # The setup of both kinds of node, as Ray has merged it, installs raywards with its versions.
    for kind in ("head", "worker"):
        assert any(
            command.startswith("pip install -c ~/raywards/constraints.txt") and "[all]" in command
            for command in prepared[f"{kind}_setup_commands"]
        )


def test_a_typo_at_the_top_is_refused(cluster: dict[str, Any]) -> None:
    cluster["idle_timeout_minute"] = cluster.pop("idle_timeout_minutes")
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        validate(cluster)


def test_a_typo_in_a_node_type_is_refused(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu"]["max_worker"] = 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate(cluster)


def test_half_a_gpu_is_refused(cluster: dict[str, Any]) -> None:
    cluster["available_node_types"]["gpu"]["resources"]["GPU"] = 0.5
    with pytest.raises(jsonschema.ValidationError, match=r"0\.5"):
        validate(cluster)


def test_an_unknown_head_node_type_is_refused(cluster: dict[str, Any]) -> None:
    cluster["head_node_type"] = "heads"
    with pytest.raises(ValueError, match="head_node_type"):
        validate(cluster)


@pytest.mark.parametrize("variable", ["RAY_AUTH_MODE=token", "RAY_SERVE_ENABLE_HA_PROXY=1"])
def test_every_node_has_the_variable(cluster: dict[str, Any], variable: str) -> None:
    # `run_options` reach head and workers; `head_run_options` would reach the head alone.
    assert f"--env {variable}" in cluster["docker"]["run_options"]
    assert "~/.ray/auth_token" in cluster["file_mounts"]


def test_the_images_hold_the_ray_that_constraints_pin(cluster: dict[str, Any]) -> None:
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    pinned = {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}
    for image in ("head_image", "worker_image"):
        assert cluster["docker"][image].startswith(f"rayproject/ray:{pinned['ray']}-py311")


def test_what_the_nodes_install_is_what_make_dist_writes(cluster: dict[str, Any]) -> None:
    assert cluster["file_mounts"]["~/raywards"] == "dist"
    recipe = (ROOT / "Makefile").read_text().partition("\ndist:")[2].partition("\n\n")[0]
    assert "--wheel-dir dist" in recipe
    assert "cp constraints.txt dist/" in recipe


def test_the_machine_image_is_filled_in_once_for_all_node_types(cluster: dict[str, Any]) -> None:
    nodes = cluster["available_node_types"].values()
    assert len(nodes) > 1
    assert len({node["node_config"]["ImageId"] for node in nodes}) == 1
