"""What a run says about where it ran: versions, cores and date, and nothing that would name the machine."""

import datetime as dt
import importlib.metadata
import os
import platform
import re
from dataclasses import dataclass, field

from benchmarks.peers import versions as peer_versions

from servers import server_version


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, the machine's core count and the date."""

    date: str
    platform: str
    cores: int
    versions: dict[str, str]
    peers: dict[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        """Return all of it in a line."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"{self.date}, {self.platform}, {self.cores} cores, {versions}"


def environment(kind: str) -> Environment:
    """Describe this machine and what is installed, for a server of this kind."""
    said = server_version(kind) or ""
    number = re.search(r"v=([0-9.]+)", said)
    return Environment(
        date=dt.datetime.now(dt.UTC).strftime("%Y-%m-%d"),
        platform=f"{platform.system()} {platform.machine()}",
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions={
            "asyncidem": _version("asyncidem"),
            "Python": platform.python_version(),
            "redis-py": _version("redis"),
            "hiredis": _version("hiredis"),
            {"valkey": "Valkey", "redis": "Redis"}[kind]: number.group(1) if number else "unknown",
        },
        peers=peer_versions(),
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "source tree"
