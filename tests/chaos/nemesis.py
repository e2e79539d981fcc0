"""What goes wrong: lanes of faults, each with its own seed, on processes, on the network and on the servers."""

import asyncio
import random
import signal
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from proxy import Proxy
from servers import Cluster, Server

Fault = Callable[[random.Random], Awaitable[None]]

SETTLES_WITHIN: Final = 20.0
"""Seconds that a cluster may take until all its nodes are well again."""


async def until(condition: Callable[[], object], seconds: float) -> bool:
    """Ask a server, in a thread, until something is so; say whether it was within some seconds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while loop.time() < end:
        try:
            if await asyncio.to_thread(condition):
                return True
        except (OSError, RuntimeError):
            pass  # it restarts, or is loading
        await asyncio.sleep(0.02)
    return False


class Victim(ABC):
    """The processes of the workers, one in each slot, and the network between them and the servers."""

    proxies: Sequence[Sequence[Proxy]]
    """Of each slot that is not connected directly, the proxies to the nodes."""

    @abstractmethod
    async def processes(self) -> Sequence[asyncio.subprocess.Process]:
        """Return the processes, when each of them has begun to work: one that was never heard of loses nothing."""

    @abstractmethod
    async def kill(self, slot: int) -> None:
        """Kill a worker, and start another in its slot."""

    @abstractmethod
    def note(self, what: str, **more: Any) -> None:
        """Log an event."""


class Network:
    """Faults on the connections of some slots, in the proxies.

    Args:
        slots: of each, the proxies to the nodes.
    """

    def __init__(self, slots: Sequence[Sequence[Proxy]]) -> None:
        self.slots = slots
        self.faults: dict[str, Fault] = {
            "replies lost": self.lose_replies,
            "requests lost": self.lose_requests,
            "requests late": self.delay_requests,
            "black hole": self.black_hole,
            "connections cut": self.cut,
            "connections refused": self.refuse,
        }

    def _proxies(self, pick: random.Random) -> Sequence[Proxy]:
        """Return some of a slot's proxies: to one node, or to all."""
        proxies = pick.choice(self.slots)
        return proxies if pick.random() < 0.5 else [pick.choice(proxies)]

    async def lose_replies(self, pick: random.Random) -> None:
        """Let the server do what it is asked, and reset the connection instead of the reply."""
        count = pick.randint(1, 4)
        for proxy in self._proxies(pick):
            proxy.drop_replies(count)

    async def lose_requests(self, pick: random.Random) -> None:
        """Reset the connection instead of passing on the request."""
        count = pick.randint(1, 4)
        for proxy in self._proxies(pick):
            proxy.drop_requests(count)

    async def delay_requests(self, pick: random.Random) -> None:
        """Keep requests until their clients have given up, and let them reach the server then."""
        await self._for_a_while(pick, (0.3, 1.2), Proxy.hold_requests)

    async def black_hole(self, pick: random.Random) -> None:
        """Answer nothing, on connections that stay open for as long."""
        lost = pick.random() < 0.5
        await self._for_a_while(pick, (0.3, 1.5), lambda proxy: proxy.black_hole(requests=lost), broken=True)

    async def cut(self, pick: random.Random) -> None:
        """Cut connections, with whatever is on them."""
        for proxy in self._proxies(pick):
            proxy.cut()

    async def refuse(self, pick: random.Random) -> None:
        """Accept no connection."""
        await self._for_a_while(pick, (0.1, 0.8), Proxy.refuse)

    async def _for_a_while(
        self,
        pick: random.Random,
        seconds: tuple[float, float],
        fault: Callable[[Proxy], None],
        *,
        broken: bool = False,
    ) -> None:
        proxies = self._proxies(pick)
        try:
            for proxy in proxies:
                proxy.reset_counters()  # it keeps what it has seen
                fault(proxy)
            await asyncio.sleep(pick.uniform(*seconds))
        finally:
            for proxy in proxies:
                if broken:
                    proxy.cut()  # no network loses bytes in the middle of a connection, and then goes on with it
                proxy.heal()
                await listen(proxy)


async def listen(proxy: Proxy) -> None:
    """Let a proxy listen again, when whoever on this machine took its port meanwhile has given it back."""
    for _ in range(100):
        try:
            await proxy.start()
            return
        except OSError:
            await asyncio.sleep(0.05)
    await proxy.start()


class Nemesis:
    """Injects faults until it is told to stop; each fault heals itself.

    Args:
        victim: the workers.
        target: the server or the cluster behind the proxies.
        seed: of all choices. What they meet depends on processes that run as they like.
    """

    def __init__(self, victim: Victim, target: Server | Cluster, seed: str) -> None:
        self.victim = victim
        self.target = target
        self.seed = seed
        freezing: dict[str, Fault] = {"worker frozen": self.freeze_worker}
        killing: dict[str, Fault] = {"worker killed": self.kill_worker}
        server: dict[str, Fault] = {
            "clients killed": self.kill_clients,
            "scripts flushed": self.flush_scripts,
            "writes paused": self.pause_writes,
            "server frozen": self.freeze_server,
        }
        if isinstance(target, Cluster):
            server["failover"] = self.fail_over
            server["master killed"] = self.kill_master
        else:
            server["server killed"] = self.kill_server
        self.lanes: list[tuple[str, dict[str, Fault], tuple[float, float]]] = [
            ("freeze-1", freezing, (0.2, 1.0)),
            ("freeze-2", freezing, (0.2, 1.0)),
            ("kill", killing, (0.8, 2.5)),
            # What one lane breaks, no other heals.
            ("network-1", Network(victim.proxies[::2]).faults, (0.05, 0.5)),
            ("network-2", Network(victim.proxies[1::2]).faults, (0.05, 0.5)),
            ("server", server, (0.2, 1.0)),
        ]

    async def rage(self, seconds: float) -> None:
        """Run all lanes for some seconds, until each has had all of its kinds and its last fault has healed."""
        end = asyncio.get_running_loop().time() + seconds
        async with asyncio.TaskGroup() as group:
            for name, faults, gap in self.lanes:
                group.create_task(self._run(random.Random(f"{self.seed}/{name}"), faults, gap, end))

    async def _run(self, pick: random.Random, faults: dict[str, Fault], gap: tuple[float, float], end: float) -> None:
        loop = asyncio.get_running_loop()
        first = random.Random(pick.random()).sample(sorted(faults), len(faults))  # each kind once, then any
        while True:
            await asyncio.sleep(pick.uniform(*gap))
            if loop.time() >= end and not first:
                return
            kind = first.pop() if first else pick.choice(sorted(faults))
            self.victim.note("fault", kind=kind)
            # Each fault draws from a stream of its own, whatever it draws.
            await faults[kind](random.Random(pick.random()))

    # -- processes --------------------------------------------------------------------------------------------------

    async def freeze_worker(self, pick: random.Random) -> None:
        """Stop a worker for longer than its leases: what it does when it goes on, it does as a zombie."""
        process = pick.choice(await self.victim.processes())
        self._signal(process, signal.SIGSTOP)
        try:
            await asyncio.sleep(pick.uniform(0.5, 2.2))
        finally:
            self._signal(process, signal.SIGCONT)

    @staticmethod
    def _signal(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
        if process.returncode is None:  # another lane may have killed it
            process.send_signal(number)

    async def kill_worker(self, pick: random.Random) -> None:
        """Kill a worker in the middle of whatever it does."""
        await self.victim.kill(pick.randrange(len(await self.victim.processes())))

    # -- servers ----------------------------------------------------------------------------------------------------

    @property
    def nodes(self) -> Sequence[Server]:
        """The servers."""
        return self.target.nodes if isinstance(self.target, Cluster) else [self.target]

    async def kill_clients(self, pick: random.Random) -> None:
        """Let a server close all its connections."""
        await asyncio.to_thread(pick.choice(self.nodes).command, "CLIENT", "KILL", "TYPE", "normal")

    async def flush_scripts(self, pick: random.Random) -> None:
        """Let the servers forget their scripts."""
        for node in self.nodes:
            await asyncio.to_thread(node.command, "SCRIPT", "FLUSH")

    async def pause_writes(self, pick: random.Random) -> None:
        """Let a server hold back what writes, and answer what reads."""
        node = pick.choice(self.nodes)
        milliseconds = pick.randint(100, 800)
        await asyncio.to_thread(node.command, "CLIENT", "PAUSE", str(milliseconds), "WRITE")
        await asyncio.sleep(milliseconds / 1000)

    async def freeze_server(self, pick: random.Random) -> None:
        """Stop a server: connections stay open, and what was sent to it runs late."""
        node = pick.choice(self.nodes)
        node.pause()
        try:
            await asyncio.sleep(pick.uniform(0.2, 1.2))
        finally:
            node.resume()

    async def kill_server(self, _: random.Random) -> None:
        """Kill the server and start it on the same port; it has written to its file whatever it has acknowledged."""
        await asyncio.to_thread(self.nodes[0].restart)

    def _replicas(self) -> list[Server]:
        return [node for node in self.nodes if "master_link_status:up" in node.text("INFO", "replication")]

    async def fail_over(self, pick: random.Random) -> None:
        """Let a replica take its master's place, in good order: nothing that was acknowledged is lost."""
        replicas = await asyncio.to_thread(self._replicas)
        if not replicas:
            return
        replica = pick.choice(replicas)
        reply = await asyncio.to_thread(replica.command, "CLUSTER", "FAILOVER")
        if reply == "+OK" and await until(lambda: "role:master" in replica.text("INFO", "replication"), 6):
            self.victim.note("carried", kind="failover")

    async def kill_master(self, pick: random.Random) -> None:
        """Kill a master whose replica has all that was acknowledged, and let that one take its place.

        Replication is asynchronous: of a master that is killed at any moment the last writes are lost, claims among
        them, and no promise holds. So it takes no writes in its last moments.
        """
        replicas = await asyncio.to_thread(self._replicas)
        if not replicas:
            return
        replica = pick.choice(replicas)
        port = _field(await asyncio.to_thread(replica.text, "INFO", "replication"), "master_port")
        master = next(node for node in self.nodes if str(node.port) == port)
        await asyncio.to_thread(master.command, "CLIENT", "PAUSE", "4000", "WRITE")
        written = int(_field(await asyncio.to_thread(master.text, "INFO", "replication"), "master_repl_offset"))

        def has_all() -> bool:
            return int(_field(replica.text("INFO", "replication"), "slave_repl_offset")) >= written

        if not await until(has_all, 2):
            await asyncio.to_thread(master.command, "CLIENT", "UNPAUSE")
            return
        await asyncio.to_thread(master.kill)
        await asyncio.to_thread(replica.command, "CLUSTER", "FAILOVER", "TAKEOVER")
        await asyncio.sleep(pick.uniform(0, 0.5))
        await asyncio.to_thread(master.start)
        self.victim.note("carried", kind="master killed")

    async def settled(self) -> None:
        """Wait until all nodes are there, know one another and replicate.

        Raises:
            TimeoutError: they do not.
        """
        if isinstance(self.target, Cluster) and not await until(self._well, SETTLES_WITHIN):
            logs = "\n".join(f"{node.port}:\n{node.log[-2000:]}" for node in self.nodes)
            message = f"the cluster is not well after {SETTLES_WITHIN:g} s:\n{logs}"
            raise TimeoutError(message)

    def _well(self) -> bool:
        if not all(node.alive and "cluster_state:ok\r" in node.text("CLUSTER", "INFO") for node in self.nodes):
            return False
        return len(self._replicas()) == len(self.nodes) // 2


def _field(info: str, name: str) -> str:
    return next(line.partition(":")[2].strip() for line in info.splitlines() if line.startswith(f"{name}:"))
