"""One run: processes, a server, what is under way between them, and the choices that an explorer makes.

The processes run until nothing is ready in them; then somebody chooses what happens next. The first choice is always
the one without a fault and without a switch to another process; time passes only where nothing else can happen. So the
choices of a run are a list of small numbers, of which those behind its end are 0.
"""

import asyncio
from collections import Counter
from typing import Any

import anyio

from asyncidem import Event, Idempotency, Store, current_operation
from asyncidem.cancellation import LINGER
from asyncidem.model import LOCK_MS, Attributes, RecordFormat

from schedules.law import Boom, Breach, Cancelled, Ended, Law, Lease, record_in
from schedules.network import KEY, Command
from schedules.plan import FREE, MAX_TURNS, Call, Option, Scenario
from schedules.processes import WALL, Process
from schedules.server import Request, Server, Value


class BreachError(AssertionError):
    """A promise was broken."""

    def __init__(self, breach: Breach) -> None:
        super().__init__(f"{breach.rule}: {breach.what}")
        self.breach = breach


class World:
    """One run of a scenario.

    Args:
        scenario: what is run.

    Attributes:
        trace: what has happened so far.
        injected: how often each fault did.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.now = 0
        options = scenario.options
        self.law = Law(
            keep_failed=options.get("on_failure") == "keep", release_cancelled=options.get("on_cancel") == "release"
        )
        self.server = Server(lambda: self.now, self._wrote)
        self.commands: list[Command] = []
        self.processes: list[Process] = []
        self.stores: list[Any] = []
        self.idempotencies: list[Idempotency] = []
        self.calls: list[list[Call]] = []
        self.trace: list[Option] = []
        self.injected: Counter[str] = Counter()
        self.current: Process | None = None
        self._labels: dict[str, Call] = {}
        for _ in range(scenario.processes):
            self._new_process()
        if scenario.orphan is not None:
            self._leave_orphan(scenario.orphan)

    def _new_process(self) -> Process:
        number = len(self.processes)
        skews = self.scenario.skews
        process = Process(number, lambda: self.now, skews[number % len(skews)])
        store = self.scenario.store(process, self)
        self.processes.append(process)
        self.stores.append(store)
        self.calls.append([])
        if isinstance(store, Store):
            options = {"lease": self.scenario.lease, "ttl": 3 * self.scenario.lease, **self.scenario.options}
            self.idempotencies.append(Idempotency(store, hooks=(self._hear,), **options))
        return process

    def _leave_orphan(self, left: float) -> None:
        """Begin with the record of a dead owner, whose lease has `left` seconds to go."""
        lease_ms, ttl_ms, now_ms = self.scenario.lease * 1000, self.scenario.lease * 3000, WALL * 1000
        past = lease_ms - int(left * 1000)
        stamp = now_ms + int(left * 1000)
        value = RecordFormat(Attributes()).in_progress("f" * 32, now_ms - past, stamp, lease_ms, ttl_ms, 1, None)
        self.server.values[KEY] = Value(value, -past, ttl_ms - past)

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.end()

    # -- what may happen ------------------------------------------------------------------------------------------------

    def options(self, *, faults: bool = True) -> list[Option]:
        """Return what may happen next, in a fixed order, faults last; none at the end of the run."""
        options = self._free()
        if not options:
            if not self._unfinished() or self._instant() is None:
                return []
            options.append(Option("time"))
        elif self.current is not None:
            options.sort(key=lambda option: option.process is not self.current)
        passes = options[0].kind != "time"
        options += [Option("late", command.process, command) for command in self.commands if command.is_late]
        if faults:
            options += self._faults(passes=passes)
        return options

    def _running(self, process: Process) -> list[Call]:
        return [call for call in self.calls[process.number] if not _done(call)]

    def _free(self) -> list[Option]:
        free = [
            Option("do" if command.state == "sent" else "answer", command.process, command)
            for command in self.commands
            if command.is_next
        ]
        for process in self.processes:
            if process.crashed:
                continue
            due = process.next_timer()
            if due is not None and due <= self.now:
                free.append(Option("tick", process))
            running = self._running(process)
            free += [Option("return", process, call) for call in running if call.gate is not None]
            if len(running) < self.scenario.at_once and len(self.calls[process.number]) < self.scenario.calls:
                free.append(Option("call", process))
        return free

    def _faults(self, *, passes: bool) -> list[Option]:
        faults: list[Option] = []
        for command in self.commands:
            if command.is_next and command.state == "sent":
                faults += [
                    Option(kind, command.process, command) for kind in ("lost", "unknown", "refuse", "slow", "cut")
                ]
        for process in self.processes:
            if process.crashed:
                continue
            running = self._running(process)
            for call in running:
                if call.gate is not None:
                    faults += [Option("raise", process, call), Option("cut", process, call)]
                if call.cancelled_at is None:
                    faults.append(Option("cancel", process, call))
            if running or self.stores[process.number]._background:
                faults.append(Option("crash", process))
        deadline, instant = self._deadline(), self._instant()
        if passes and instant is not None:
            faults.append(Option("time"))
        if deadline is not None:
            if deadline != instant:
                faults.append(Option("leap"))
            for process in self.processes:
                due = None if process.crashed else process.next_timer()
                if due is not None and due <= deadline:
                    faults.append(Option("doze", process))
        return [fault for fault in faults if fault.kind in self.scenario.faults]

    def _unfinished(self) -> bool:
        return any(
            not process.crashed
            and (self.stores[process.number]._background or any(not _done(call) for call in self.calls[process.number]))
            for process in self.processes
        )

    def _deadline(self) -> int | None:
        """Return the next moment at which something ends on the server."""
        moments: list[int] = []
        for value in self.server.values.values():
            moments.append(value.expires * 1000)
            record = record_in(value.data)
            if record is not None and record["status"] == "INPROGRESS":
                moments.append((value.written + record["lease"]) * 1000)
        return min((moment for moment in moments if moment > self.now), default=None)

    def _instant(self) -> int | None:
        """Return the next moment at which anything happens by itself."""
        moments = [self._deadline(), *(process.next_timer() for process in self.processes if not process.crashed)]
        return min((moment for moment in moments if moment is not None and moment > self.now), default=None)

    def switches(self, option: Option, options: list[Option]) -> bool:
        """Say whether `option` leaves a process that could go on."""
        first = options[0].process
        return option.kind in FREE and first is not None and first is self.current and option.process is not first

    def key(self) -> int:
        """Return a digest of the state: two runs with the same go on in the same ways."""
        return hash(
            (
                self.now,
                tuple(sorted(self.server.values.items())),
                tuple((process.history, process.crashed) for process in self.processes),
                tuple(sorted((command.process.number, command.number, command.state) for command in self.commands)),
                self.law.key(),
            )
        )

    # -- what happens ---------------------------------------------------------------------------------------------------

    def take(self, option: Option) -> None:
        """Let something happen.

        Raises:
            BreachError: it broke a promise.
        """
        self.trace.append(option)
        kind, process, what = option
        if kind not in FREE:
            self.injected[kind] += 1
        if process is not None and kind in FREE and kind != "late":
            self.current = process
        getattr(self, f"_{kind}")(process, what)
        for command in [command for command in self.commands if command.state != "late" and command.forsaken]:
            self._forsake(command)
        self.judge()

    def judge(self) -> None:
        """Raise the breach that was found, if any."""
        for process in self.processes:
            if process.noise:
                self.law.broken("errors are ours", f"the loop of P{process.number} complained: {process.noise[0]}")
        if self.law.breach is not None:
            raise BreachError(self.law.breach)

    def _turn(self, process: Process, *what: object) -> None:
        process.note(self.now, *what)
        process.turn()

    def _do(self, process: Process, command: Command) -> None:
        self._slow(process, command)
        self._answer(process, command)

    def _slow(self, process: Process, command: Command) -> None:
        command.execute(self.server)

    def _answer(self, process: Process, command: Command) -> None:
        self.commands.remove(command)
        command.deliver()
        self._turn(process, "reply", command.number, command.reply)

    def _lost(self, process: Process, command: Command) -> None:
        command.execute(self.server)
        self._unknown(process, command)

    def _unknown(self, process: Process, command: Command) -> None:
        command.lose()
        if command.state == "answered":
            self.commands.remove(command)
        else:
            command.state = "late"
        self._turn(process, "lost", command.number)

    def _late(self, _: Process, command: Command) -> None:
        command.execute(self.server)
        self.commands.remove(command)

    def _refuse(self, process: Process, command: Command) -> None:
        self.commands.remove(command)
        command.refuse()
        self._turn(process, "refused", command.number)

    def _return(self, process: Process, call: Call) -> None:
        self._end_handler(call, None)
        self._turn(process, "return", call.label)

    def _raise(self, process: Process, call: Call) -> None:
        self._end_handler(call, Boom())
        self._turn(process, "raise", call.label)

    def _end_handler(self, call: Call, error: Exception | None) -> None:
        gate, call.gate = call.gate, None
        assert gate is not None
        if error is None:
            gate.set_result(None)
        else:
            gate.set_exception(error)

    def _tick(self, process: Process, _: object) -> None:
        self._turn(process, "tick")

    def _call(self, process: Process, _: object = None) -> None:
        calls = self.calls[process.number]
        call = Call(process, len(calls))
        self._labels[call.label] = call
        calls.append(call)
        call.task = process.create_task(self._caller(call))
        self._turn(process, "call", call.label)

    def _crash(self, process: Process, _: object) -> None:
        process.crashed = True
        for command in [command for command in self.commands if command.process is process]:
            self._forsake(command)

    def _forsake(self, command: Command) -> None:
        """Let nobody wait for a command any more: the server may still carry it out."""
        if command.state == "answered":
            self.commands.remove(command)
            command.drop()
        else:
            command.state = "late"

    def _cancel(self, process: Process, call: Call) -> None:
        self._cancel_call(call)
        self._turn(process, "cancel", call.label)

    def _cut(self, process: Process, what: Call | Command) -> None:
        if isinstance(what, Call):
            self._end_handler(what, None)
            calls = [what]
        else:
            what.execute(self.server)
            self.commands.remove(what)
            what.deliver()
            calls = self.calls[process.number]
        for call in calls:
            if call.cancelled_at is None and not _done(call):
                self._cancel_call(call)
        self._turn(process, "cut", str(what) if isinstance(what, Command) else what.label)

    def _cancel_call(self, call: Call) -> None:
        assert call.task is not None
        call.cancelled_at = self.now
        if call.scope is not None:
            # A scope is cancelled in its own loop.
            call.process.call_soon(call.scope.cancel)
        else:
            call.task.cancel()

    def _time(self, *_: object) -> None:
        instant = self._instant()
        assert instant is not None
        self._pass(instant)

    def _leap(self, *_: object) -> None:
        deadline = self._deadline()
        assert deadline is not None
        self._pass(deadline)

    def _doze(self, process: Process, _: object) -> None:
        deadline = self._deadline()
        assert deadline is not None
        self._pass(deadline, asleep=process)

    def _pass(self, until: int, asleep: Process | None = None) -> None:
        """Let time pass, with the timers on the way."""
        awake = [process for process in self.processes if not process.crashed and process is not asleep]
        for _ in range(MAX_TURNS):
            timers = [(due, process) for process in awake if (due := process.next_timer()) is not None and due <= until]
            if not timers:
                break
            due = min(timers, key=lambda timer: timer[0])[0]
            self.now = max(self.now, due)
            for when, process in timers:
                if when <= self.now:
                    self._turn(process, "tick")
        else:
            self.law.broken("runs end", f"timers keep {len(awake)} processes busy at {self.now} µs")
        self.now = until
        for process in awake:
            for call in self.calls[process.number]:
                if (
                    call.cancelled_at is not None
                    and not _done(call)
                    and until > call.cancelled_at + (LINGER + 0.1) * 1e6
                ):
                    self.law.broken("cancellation arrives", f"{call.label} lingers {until - call.cancelled_at} µs")

    # -- callers and handlers -------------------------------------------------------------------------------------------

    async def _caller(self, call: Call) -> None:
        result: Any = None
        error: BaseException | None = None
        run = self.scenario.run or _run_operation
        try:
            if self.scenario.anyio:
                error = asyncio.CancelledError()
                with anyio.CancelScope() as call.scope:
                    result, error = await run(self, call), None
            else:
                result = await run(self, call)
        except BaseException as caught:
            error = caught
        cancelled: Cancelled = "" if call.cancelled_at is None else "at every await" if self.scenario.anyio else "once"
        self.law.ended(Ended(call.label, call.effect, result, error, call.events, cancelled))

    async def handle(self, call: Call, claim: Lease) -> str:
        """Do what a handler does: begin, wait until the explorer lets it end, return what nobody else returns."""
        call.effect = effect = self.law.starts(call.process, call.label, claim, self.server.find(KEY))
        call.gate = call.process.create_future()
        try:
            await call.gate
        except Boom:
            effect.status = "raised"
            raise
        except asyncio.CancelledError:
            effect.status = "cancelled"
            raise
        finally:
            call.gate = None
        effect.status = "returned"
        return call.label

    def _hear(self, event: Event) -> None:
        if event.operation is not None:
            self._labels[event.operation].events.append(event.name)

    def _wrote(self, key: str, before: Value | None, after: bytes | None, request: Request) -> None:
        if key != KEY:
            return
        if before is None and key in self.server.expired:
            self.server.expired.discard(key)
            self.law.expired()
        self.law.wrote(key, before, after, request, self.server.now)

    # -- the end --------------------------------------------------------------------------------------------------------

    def conclude(self) -> None:
        """Let the faults stop, and see that nothing is stuck.

        Raises:
            BreachError: something is.
        """
        for process in self.processes:
            for call in self.calls[process.number]:
                if not process.crashed and not _done(call):
                    self.law.broken("no call hangs", f"{call.label} waits for nothing")
        interrupted = any(process.crashed for process in self.processes) or any(
            option.kind == "late" for option in self.trace
        )
        self.commands = [command for command in self.commands if command.state != "late"]
        found = self.server.find(KEY)
        record = None if found is None else record_in(found.data)
        # A claim whose owner is alive and ended was given back, unless its effect may have happened.
        if record is not None and found is not None and record["status"] == "INPROGRESS" and not interrupted:
            left = record["lease"] - (self.server.now - found.written)
            owners = {effect.claim.owner for effect in self.law.effects if not self.law.known(effect)}
            if left > 0 and record["owner"] not in owners and record["owner"] != "f" * 32:
                self.law.broken("nothing is left", f"{record['owner']} ran nothing, and its claim has {left} ms to go")
        self.judge()
        self._finish_commands()
        lock_ms = min(LOCK_MS, self.scenario.lease * 1000)
        self._pass(self.now + (self.scenario.lease * 1000 + lock_ms + 1) * 1000)
        self._finish_commands()
        self._probe()
        self.judge()

    def _probe(self) -> None:
        process = self._new_process()
        self._call(process)
        (call,) = self.calls[process.number]
        for _ in range(20):
            self._finish_commands()
            if call.gate is not None:
                self._end_handler(call, None)
                self._turn(process, "return", call.label)
        if not _done(call):
            self.law.broken("no key stays stuck", f"{call.label} does not end")
        elif call.effect is None and not self.law.replays[-1:]:
            self.law.broken("no key stays stuck", f"{call.label} got nothing and ran nothing: {call.events}")
        elif call.effect is None and call.events and call.events[-1] == "in_progress":
            self.law.broken("no key stays stuck", f"{call.label} is refused after a lease and a takeover's lock")

    def _finish_commands(self) -> None:
        for _ in range(20):
            commands = [command for command in self.commands if command.is_next]
            if not commands:
                return
            for command in commands:
                if command.state == "sent":
                    command.execute(self.server)
                self._answer(command.process, command)


def _done(call: Call) -> bool:
    return call.task is not None and call.task.done()


async def _run_operation(world: World, call: Call) -> Any:
    """Run the operation, as a user does."""

    async def handler() -> str:
        op = current_operation()
        assert op is not None
        assert op._claim is not None
        return await world.handle(call, op._claim)

    return await world.idempotencies[call.process.number].run(KEY, handler, name=call.label)
