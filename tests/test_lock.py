"""requirements.lock: every package of the tests' environment, in one version and with hashes."""

import re
from importlib.metadata import PackageNotFoundError, requires

from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
SHA256 = re.compile(r"--hash=sha256:[0-9a-f]{64}$")


def locked() -> dict[str, tuple[str, list[str]]]:
    """Return the version and the hashes of each package in the lock file."""
    found = {}
    entries = re.sub(r"^ *#.*\n", "", LOCK, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    for entry in filter(None, map(str.strip, entries)):
        requirement, *hashes = entry.split(" --hash=")
        name, _, version = requirement.partition(";")[0].strip().partition("==")
        name = name.partition("[")[0]
        found[canonicalize_name(name)] = (version, [f"--hash={each.strip()}" for each in hashes])
    return found


def required() -> list[Requirement]:
    lines = []
    for name in ("requirements.txt", "requirements_dev.txt"):
        lines += (ROOT / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and line[0] not in "#-"]


def test_every_package_has_one_version_and_hashes():
    packages = locked()
    assert len(packages) > len(required())
    for name, (version, hashes) in packages.items():
        assert Version(version) and hashes, name
        assert all(map(SHA256.match, hashes)), name


def test_versions_are_those_that_the_requirements_allow():
    packages = locked()
    for requirement in required():
        version, _ = packages[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, requirement.name


def test_packages_that_are_asked_for_with_an_extra_are_listed_with_and_without():
    """pip with --require-hashes takes `typepy[datetime]` and `typepy` for two packages."""
    packages, extras = locked(), set()
    for package in packages:
        if package == "torch":  # a build for GPUs needs CUDA packages, which are not listed
            continue
        try:
            needed = [Requirement(line) for line in requires(package) or []]
        except PackageNotFoundError:  # of another platform
            continue
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                name = canonicalize_name(requirement.name)
                extras |= {f"{name}[{extra}]" for extra in requirement.extras}
    assert extras
    for with_extra in extras:
        assert f"\n{with_extra}==" in LOCK
        assert f"\n{with_extra.partition('[')[0]}==" in LOCK


def test_it_names_no_place_to_download_from():
    assert "://" not in LOCK
    assert not re.search(r"--(extra-)?index-url|--find-links", LOCK)


def test_every_build_of_torch_is_listed():
    """Its CPU build is another file than the one for GPUs."""
    builds = re.findall(r"^# +(torch-\S+)\s+sha256:([0-9a-f]{64})$", LOCK, flags=re.MULTILINE)
    assert any("+cpu" in name for name, _ in builds)
    assert any("+cpu" not in name for name, _ in builds)
    hashes = locked()["torch"][1]
    assert {f"--hash=sha256:{digest}" for _, digest in builds} == set(hashes)
