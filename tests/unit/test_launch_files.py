"""Non-Python files of launch/: scripts are valid shell, and the Kubernetes example is consistent."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from codeparrot_ds.hosts.hostfile import read_hostfile
from codeparrot_ds.run.recipe import load_recipe
from tests.conftest import ROOT

SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed_and_say_how_they_are_used(script: Path) -> None:
    assert script.stat().st_mode & 0o111 or script.suffix == ".sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    if script.stem in ("train_multi_node", "slurm_train", "slurm_preprocess", "ray_preprocess"):
        done = subprocess.run(["bash", script], capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "usage: " in done.stderr


@pytest.fixture
def kubernetes() -> dict[str, dict[str, Any]]:
    """Objects of the example by kind."""
    objects = list(yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text()))
    assert all({"apiVersion", "kind", "metadata"} <= set(each) for each in objects)
    return {each["kind"]: each for each in objects}


def test_the_kubernetes_example_names_the_hosts_that_it_makes(
    kubernetes: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    pods, service = kubernetes["StatefulSet"], kubernetes["Service"]
    files = kubernetes["ConfigMap"]["data"]
    (tmp_path / "hosts").write_text(files["hosts"])
    name, subdomain = pods["metadata"]["name"], service["metadata"]["name"]
    assert pods["spec"]["serviceName"] == subdomain and service["spec"]["clusterIP"] == "None"
    container = pods["spec"]["template"]["spec"]["containers"][0]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    expected = {f"{name}-{number}.{subdomain}": gpus for number in range(pods["spec"]["replicas"])}
    assert read_hostfile(tmp_path / "hosts") == expected
    labels = pods["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == pods["spec"]["selector"]["matchLabels"] == labels


def test_the_kubernetes_example_mounts_what_it_uses(kubernetes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    spec = kubernetes["StatefulSet"]["spec"]["template"]["spec"]
    volumes = {each["name"]: each for each in spec["volumes"]}
    mounts = {each["mountPath"]: each["name"] for each in spec["containers"][0]["volumeMounts"]}
    assert set(mounts.values()) == set(volumes)
    assert volumes["config"]["configMap"]["name"] == kubernetes["ConfigMap"]["metadata"]["name"]
    claim = kubernetes["PersistentVolumeClaim"]
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]  # by all hosts
    start = tmp_path / "start.sh"
    start.write_text(kubernetes["ConfigMap"]["data"]["start.sh"])
    subprocess.run(["bash", "-n", start], check=True)
    assert spec["containers"][0]["command"] == ["bash", "/config/start.sh"]
    recipe = start.read_text().partition("launch ")[2].split()[0]
    assert load_recipe(Path(recipe))
