"""Owns one test node: starts it, holds its control channel, and lets any number of clients use it.

Clients connect to a socket in the state directory and speak wire.py's frames, each connection being one session. The
supervisor numbers the sessions; when a client goes away, its command is killed. When the node ends, so does this.
"""

import asyncio
import os
import signal
import socket
import sys

import wire
from machine import Machine


class Supervisor:
    """One node and its clients."""

    def __init__(self, machine, state):
        self.machine = machine
        self.state = state
        self.clients = {}
        self.next_session = 1
        self.node = None
        self.report = None

    async def run(self, report):
        """Starts the node, tells `report` (a file descriptor) how it goes, serves until it is down."""
        self.report = os.fdopen(report, "wb", buffering=0)
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        self.stop = stop
        channel = await self.machine.start()
        reader, self.node = await asyncio.open_connection(sock=channel)
        tasks = [
            asyncio.create_task(self.read_node(reader)),
            asyncio.create_task(self.machine.wait()),
            asyncio.create_task(stop.wait()),
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        self.tell(wire.FAILED, b"the node ended; see " + os.fsencode(self.machine.console))
        await self.machine.stop()

    def tell(self, kind, payload=b""):
        """Reports to whoever started this, as long as they listen."""
        if self.report is None:
            return
        try:
            self.report.write(wire.pack(wire.NODE, kind, payload))
        except BrokenPipeError:
            pass
        if kind in (wire.READY, wire.FAILED):
            self.report.close()
            self.report = None

    async def read_node(self, reader):
        """Passes the node's frames to their clients."""
        frames = wire.Frames()
        while data := await reader.read(65536):
            for session, kind, payload in frames.feed(data):
                if session != wire.NODE:
                    self.to_client(session, kind, payload)
                    continue
                if kind == wire.READY:
                    # Before it is told: whoever hears of it connects at once.
                    await asyncio.start_unix_server(self.serve, self.state / "control.sock")
                self.tell(kind, payload)
                if kind == wire.FAILED:
                    return

    def to_client(self, session, kind, payload):
        """One frame to the client of a session; a client that left is forgotten at the end of its command."""
        writer = self.clients.get(session)
        if writer is not None:
            writer.write(wire.pack(session, kind, payload))
        if kind == wire.EXIT and self.clients.pop(session, None) is not None:
            writer.close()

    async def serve(self, reader, writer):
        """One client."""
        session = self.next_session
        self.next_session += 1
        frames = wire.Frames()
        try:
            while data := await reader.read(65536):
                for _, kind, payload in frames.feed(data):
                    if kind == wire.DOWN:
                        self.stop.set()
                        return
                    if kind == wire.OPEN:
                        self.clients[session] = writer
                    self.node.write(wire.pack(session, kind, payload))
        except ConnectionError:
            pass
        if session in self.clients:
            self.clients[session] = None
            self.node.write(wire.pack(session, wire.SIGNAL, bytes([signal.SIGKILL])))
        writer.close()


def start(state):
    """Starts a supervisor in the background; returns a descriptor to read its report from."""
    report_read, report_write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        # Nothing of the caller's stays open, its lock least of all.
        os.closerange(3, report_write)
        os.closerange(report_write + 1, os.sysconf("SC_OPEN_MAX"))
        with open(state / "supervisor.log", "ab", buffering=0) as log, open(os.devnull, "rb") as null:
            os.dup2(null.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        status = 1
        try:
            (state / "pid").write_text(f"{os.getpid()}\n")
            asyncio.run(Supervisor(Machine(state), state).run(report_write))
            status = 0
        finally:
            for name in ("control.sock", "pid"):
                (state / name).unlink(missing_ok=True)
            sys.stderr.flush()
            os._exit(status)
    os.close(report_write)
    return report_read


def connect(state):
    """A client's socket to the running node, or None when there is none."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.connect(os.fspath(state / "control.sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        client.close()
        return None
    return client
