"""A round of chaos: servers, workers and a nemesis for some seconds, then peace, one call of each key, and the verdict."""

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from chaos.history import Report, check
from chaos.nemesis import Nemesis, Victim, until
from chaos.worker import Settings
from proxy import Proxy
from servers import BINARIES, HOST, Cluster, Server, find_binary

SLOTS: Final = 4
"""Workers that run at a time; all but the last of them are connected through proxies."""

ENDS_WITHIN: Final = 20.0
"""Seconds that a worker may take to finish what it has begun, and a sweep to call every key."""

SHOWN: Final = 5
"""How many violations are shown with the whole history of their key."""


@dataclass(frozen=True)
class Configuration:
    """What is under test: one server or a cluster, and the path of the store."""

    cluster: bool
    multiplex: bool

    def __str__(self) -> str:
        """Return its name, which is the id of its test."""
        return f"{'cluster' if self.cluster else 'server'}-{'multiplexed' if self.multiplex else 'plain'}"


CONFIGURATIONS: Final = [Configuration(cluster, path) for cluster in (False, True) for path in (True, False)]


@dataclass
class Round:
    """What a round came to."""

    configuration: Configuration
    seed: int
    seconds: float
    kind: str
    directory: Path
    events: list[dict[str, Any]]
    report: Report

    def explain(self) -> str:
        """Return the violations, the histories of some of their keys, and how to have such a round again."""
        lines = [f"{len(self.report.violations)} violations on {self.configuration} ({self.kind}), seed {self.seed}:"]
        for number, (kind, key, text) in enumerate(self.report.violations):
            lines.append(f"- {kind} {key}: {text}")
            if key and number < SHOWN:
                lines += [f"    {line}" for line in self.report.lines(key, self.events)]
        lines.append(
            f"Again: nox -s chaos -- --seed {self.seed} --seconds {self.seconds:g} -k {self.configuration}\n"
            f"The faults and what the workers want to do come from the seed; when real processes come to it does not."
            f"\nAll logs: {self.directory}"
        )
        return "\n".join(lines)


class Workers(Victim):
    """The worker processes of a round."""

    def __init__(
        self, configuration: Configuration, target: Server | Cluster, seed: int, directory: Path, *, naive: bool
    ) -> None:
        self.configuration = configuration
        self.seed = seed
        self.directory = directory
        self.naive = naive
        self.nodes: Sequence[Server] = target.nodes if isinstance(target, Cluster) else [target]
        self.proxies = [[Proxy(HOST, node.port) for node in self.nodes] for _ in range(SLOTS - 1)]
        self.slots: list[asyncio.subprocess.Process] = []
        self.names: dict[int, str] = {}
        self.origin = time.monotonic()
        self.count = 0
        self._log = (directory / "nemesis.jsonl").open("ab", buffering=0)

    def note(self, what: str, **more: Any) -> None:
        """Log an event."""
        self._log.write(json.dumps({"t": time.monotonic(), "what": what, **more}).encode() + b"\n")

    async def processes(self) -> Sequence[asyncio.subprocess.Process]:
        """Return the processes, when each of them has begun to work."""
        for process in tuple(self.slots):
            await until((self.directory / f"{self.names[process.pid]}.jsonl").read_bytes, ENDS_WITHIN)
        return self.slots

    async def spawn(self, slot: int, sweep: Sequence[str] = ()) -> asyncio.subprocess.Process:
        """Start a process."""
        self.count += 1
        name = "sweeper" if sweep else f"w{self.count}"
        proxies = self.proxies[slot] if slot < len(self.proxies) else []
        ports = {str(node.port): proxy.port for node, proxy in zip(self.nodes, proxies, strict=bool(proxies))}
        settings = Settings(
            name=name,
            seed=f"{self.seed}/{name}",
            url=proxies[0].url if proxies else self.nodes[0].url,
            cluster=self.configuration.cluster,
            multiplex=self.configuration.multiplex,
            ports=ports,
            naive=self.naive,
            log=str(self.directory / f"{name}.jsonl"),
            origin=self.origin,
            sweep=list(sweep),
        )
        tests = Path(__file__).parent.parent
        path = os.pathsep.join(filter(None, (str(tests), os.environ.get("PYTHONPATH"))))
        command = ("-W", "error", str(tests / "chaos" / "worker.py"), json.dumps(asdict(settings)))
        with (self.directory / f"{name}.stderr").open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *command, stderr=stderr, env={**os.environ, "PYTHONPATH": path}
            )
        self.names[process.pid] = name
        self.note("spawned", worker=name, pid=process.pid, slot=slot)
        return process

    async def kill(self, slot: int) -> None:
        """Kill a worker, and start another in its slot."""
        process = self.slots[slot]
        if process.returncode is None:
            self.note("killed", worker=self.names[process.pid])
            process.kill()
        await self.gone(process)
        self.slots[slot] = await self.spawn(slot)

    async def gone(self, process: asyncio.subprocess.Process) -> None:
        """Wait for the end of a process, and log it."""
        name = self.names[process.pid]
        stderr = self.directory / f"{name}.stderr"
        try:
            async with asyncio.timeout(ENDS_WITHIN):
                code = await process.wait()
        except TimeoutError:
            process.send_signal(signal.SIGUSR1)  # it writes where it is
            await asyncio.sleep(0.5)
            process.kill()
            code = await process.wait()
            self.note("killed", worker=name)
            self.note("hung", worker=name, stderr=stderr.read_text(errors="replace"))
            return
        self.note("exited", worker=name, code=code, stderr=stderr.read_text(errors="replace"))

    async def __aenter__(self) -> "Workers":
        """Start proxies and workers."""
        for proxy in (proxy for slot in self.proxies for proxy in slot):
            await proxy.start()
        for slot in range(SLOTS):
            self.slots.append(await self.spawn(slot))
        await self.processes()
        return self

    async def finish(self) -> None:
        """End the workers in good order, and call each key once."""
        for process in await self.processes():
            if process.returncode is None:
                process.terminate()
        await asyncio.gather(*(self.gone(process) for process in self.slots))
        orders = sorted({event["order"] for event in self.events() if event["what"] == "call"})
        if orders:
            sweeper = await self.spawn(SLOTS, orders)
            self.slots.append(sweeper)
            await self.gone(sweeper)

    async def __aexit__(self, *_: object) -> None:
        """Leave no process and no proxy behind."""
        for process in self.slots:
            with contextlib.suppress(ProcessLookupError):
                if process.returncode is None:
                    process.kill()
            await process.wait()
        for proxy in (proxy for slot in self.proxies for proxy in slot):
            await proxy.close()
        self._log.close()

    def events(self) -> list[dict[str, Any]]:
        """Return all that was logged so far."""
        return [
            json.loads(line)
            for path in sorted(self.directory.glob("*.jsonl"))
            for line in path.read_bytes().splitlines()
        ]


@contextlib.asynccontextmanager
async def servers(configuration: Configuration, kind: str, directory: Path) -> AsyncIterator[Server | Cluster]:
    """Run the servers of a configuration, which keep what they acknowledge."""
    target: Server | Cluster
    if configuration.cluster:
        # A frozen master must not be replaced: its last writes would be lost. What is promoted here has all of them.
        # And a master that is asked for its data sends them, instead of waiting for more who may ask.
        options = ("--cluster-replica-no-failover", "yes", "--repl-diskless-sync-delay", "0")
        target = Cluster(kind, directory, *options)
    else:
        target = Server(kind, directory, "--appendonly", "yes", "--appendfsync", "always")
    await asyncio.to_thread(target.start)
    try:
        yield target
    finally:
        await asyncio.to_thread(target.stop)


async def play(
    configuration: Configuration, seed: int, seconds: float, directory: Path, *, naive: bool = False
) -> Round:
    """Play a round and check what was logged."""
    kinds = [kind for kind in BINARIES if find_binary(kind) is not None]
    kind = random.Random(seed).choice(kinds)
    logs = directory / "logs"
    logs.mkdir(parents=True)
    async with (
        servers(configuration, kind, directory / "servers") as target,
        Workers(configuration, target, seed, logs, naive=naive) as workers,
    ):
        nemesis = Nemesis(workers, target, f"{seed}/nemesis")
        await nemesis.rage(seconds)
        await nemesis.settled()
        await workers.finish()
    events = workers.events()
    return Round(configuration, seed, seconds, kind, logs, events, check(events))
