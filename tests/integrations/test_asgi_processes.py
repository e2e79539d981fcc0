"""The ASGI middleware in a process of its own, over a real server: killed, and flooded with streams."""

import asyncio
import socket

import httpx
import pytest
import redis.asyncio

from served import PIECE, PIECES, process

KEY = {"Idempotency-Key": "order-1"}
MIB = 1024 * 1024


async def test_a_server_that_is_killed_in_the_middle_of_a_handler(redis_url: str) -> None:
    """After restart and lease the retry runs once more, as the second attempt, and its result is the one that stays."""
    async with redis.asyncio.Redis.from_url(redis_url) as client, httpx.AsyncClient(timeout=30) as http:
        await client.set("hold", 1)
        with process(redis_url) as server:
            first = asyncio.create_task(http.post(f"{server.address}/pay", headers=KEY))
            while not await client.llen("effects"):  # type: ignore[misc]
                await asyncio.sleep(0.01)
            await asyncio.to_thread(server.kill)
            with pytest.raises(httpx.TransportError):
                await first
            await client.delete("hold")
            await asyncio.to_thread(server.start)
            answers = await asyncio.gather(*(http.post(f"{server.address}/pay", headers=KEY) for _ in range(5)))
        effects = await client.lrange("effects", 0, -1)  # type: ignore[misc]
    assert [answer.status_code for answer in answers] == [201] * 5
    assert {answer.content for answer in answers} == {b'{"charge": 2}'}
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 4
    assert effects == [b"1", b"2"]


@pytest.mark.once
async def test_a_hundred_streams_at_once_are_not_held_in_memory() -> None:
    """100 responses of 50 MB each, guarded, side by side: 64 MiB above the idle process, and every byte arrives."""
    all_open = asyncio.Barrier(100)
    buffer = bytearray(MIB)
    loop = asyncio.get_running_loop()

    def connect(address: str) -> socket.socket:
        host, port = address.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)))
        client.setblocking(False)
        return client

    async def stream(address: str, number: int) -> int:
        head = f"POST /stream HTTP/1.1\r\nHost: a\r\nIdempotency-Key: s{number}\r\nConnection: close\r\n"
        with connect(address) as client:
            await loop.sock_sendall(client, f"{head}Content-Length: 0\r\n\r\n".encode())
            size = await loop.sock_recv_into(client, buffer)
            assert buffer.startswith(b"HTTP/1.1 200")
            await all_open.wait()
            while part := await loop.sock_recv_into(client, buffer):
                size += part
            return size

    with process(None) as server:
        async with httpx.AsyncClient(base_url=server.address) as http:
            (await http.post("/nothing", headers=KEY)).raise_for_status()
        idle = server.memory("VmRSS")
        sizes = await asyncio.gather(*(stream(server.address, number) for number in range(100)))
        peak = server.memory("VmHWM")
    assert min(sizes) > PIECES * len(PIECE)
    assert peak - idle <= 64 * MIB
