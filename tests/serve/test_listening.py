"""The server's socket."""

import asyncio
import socket
from pathlib import Path

from sarm.serve.server import listening
from sarm.settings.serving import Serving


def test_an_answer_does_not_wait_for_the_receipt_of_its_beginning(tmp_path: Path) -> None:
    """What asyncio accepts on the socket sends at once; without TCP_NODELAY, every answer over a kept connection takes 40 ms longer."""

    async def nodelay(taken: socket.socket) -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(accepted, sock=taken):
            _, writer = await asyncio.open_connection(*taken.getsockname()[:2])
            value = await asyncio.wait_for(found, 10)
            writer.close()
            return value

    with listening(Serving(model=tmp_path, port=0)) as taken:
        assert asyncio.run(nodelay(taken.dup())) == 1
