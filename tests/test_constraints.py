"""constraints.txt names one version of everything that pyproject.toml asks for, within its bounds."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LEFT_OUT = {"torch", "cuda13"}  # a program to compare with; the other CUDA


def test_every_requirement_has_a_version_within_its_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [*project["dependencies"], *(r for name, rs in extras.items() if name not in LEFT_OUT for r in rs)]
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    fixed = dict(line.split("==") for line in lines)
    assert len(fixed) == len(lines)
    versions = {canonicalize_name(name): version for name, version in fixed.items()}
    for requirement in map(Requirement, asked):
        if requirement.name != project["name"]:
            version = versions[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement} and {version}"
