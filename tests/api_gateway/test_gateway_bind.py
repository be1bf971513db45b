"""The gateway's own socket: its answers leave at once."""

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from api_gateway.__main__ import bind
from api_gateway.settings import Settings

LOOPS = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("make_loop", LOOPS.values(), ids=LOOPS)
def test_an_answer_does_not_wait_for_the_one_before_to_be_acknowledged(
    tmp_path: Path, make_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """asyncio switches Nagle's algorithm off only on a socket whose protocol was named when it was made."""

    async def no_delay(listening: socket.socket) -> int:
        accepted = asyncio.Event()
        options: list[int] = []

        def on_peer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = writer.get_extra_info("socket")
            options.append(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()
            accepted.set()

        async with await asyncio.start_server(on_peer, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            await asyncio.wait_for(accepted.wait(), 10)
            writer.close()
            await writer.wait_closed()
        return options[0]

    with bind(Settings(state_dir=tmp_path, port=0)) as listening, asyncio.Runner(loop_factory=make_loop) as runner:
        assert listening.proto == socket.IPPROTO_TCP
        assert runner.run(no_delay(listening))
