"""What is inside: a CycloneDX 1.5 document. Pure; the same inputs give the same text."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from .packages import Package

_NAMESPACE = uuid.UUID("5f0f9a1e-6d4c-5d0b-9a55-5bfa0e6f3c21")


def component(name: str, version: str, sha256: str, purl: str, kind: str = "library") -> dict[str, Any]:
    """One component."""
    return {"type": kind, "bom-ref": purl, "name": name, "version": version, "purl": purl, "hashes": [{"alg": "SHA-256", "content": sha256}]}


def of_package(package: Package, suite: str) -> dict[str, Any]:
    """A Debian package (purl type deb)."""
    version = package.version.replace("+", "%2B").replace(":", "%3A")
    return component(package.name, package.version, package.sha256, f"pkg:deb/debian/{package.name}@{version}?arch={package.arch}&distro={suite}")


def of_wheel(file: str, sha256: str) -> dict[str, Any]:
    """A wheel, named by its file name (PEP 427)."""
    name, version = file.split("-")[:2]
    return component(name.replace("_", "-").lower(), version, sha256, f"pkg:pypi/{name.replace('_', '-').lower()}@{version}")


def document(image: str, version: str, root_hash: str, components: Sequence[dict[str, Any]], time_s: int) -> dict[str, Any]:
    """The whole: the image is the subject, `components` what it is made of."""
    return {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "serialNumber": f"urn:uuid:{uuid.uuid5(_NAMESPACE, root_hash)}",
        "metadata": {
            "timestamp": datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), "tools": {"components": [{"type": "application", "name": "firmware_images"}]},
            "component": {"type": "firmware", "bom-ref": image, "name": image, "version": version, "hashes": [{"alg": "SHA-256", "content": root_hash}]},
        },
        "components": sorted(components, key=lambda entry: str(entry["purl"])),
        "dependencies": [{"ref": image, "dependsOn": sorted(str(entry["bom-ref"]) for entry in components)}],
    }
