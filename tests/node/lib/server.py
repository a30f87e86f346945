"""Runs commands in a test node for whoever is at the other end of the control channel (see wire.py).

    server.py CHANNEL START-SCRIPT

CHANNEL is a device to open, or `fd:N`. START-SCRIPT brings the node up; each line it prints becomes progress. Only
cheap modules are imported: under emulation every one costs a good part of a second.
"""

import errno
import fcntl
import json
import os
import select
import signal
import struct
import sys
import termios

import wire

CHUNK = 65536


class Session:
    """One command: its process and the descriptors that carry its streams."""

    def __init__(self, number, request):
        self.number = number
        self.pending = bytearray()
        self.stdin_ended = False
        if request.get("tty"):
            self._spawn_on_terminal(request)
        else:
            self._spawn_on_pipes(request)
        self.pidfd = os.pidfd_open(self.pid)
        if self.stdin is not None:
            os.set_blocking(self.stdin, False)

    def _spawn_on_terminal(self, request):
        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", request["rows"], request["cols"], 0, 0))
        self.pid = self._fork(request, (slave, slave, slave), terminal=True)
        os.close(slave)
        self.stdin = master
        self.outputs = {os.dup(master): wire.STDOUT}

    def _spawn_on_pipes(self, request):
        (in_read, self.stdin), (out_read, out_write), (err_read, err_write) = os.pipe(), os.pipe(), os.pipe()
        self.pid = self._fork(request, (in_read, out_write, err_write), terminal=False)
        for fd in (in_read, out_write, err_write):
            os.close(fd)
        self.outputs = {out_read: wire.STDOUT, err_read: wire.STDERR}

    @staticmethod
    def _fork(request, stdio, terminal):
        pid = os.fork()
        if pid:
            return pid
        try:
            os.setsid()
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            if terminal:
                fcntl.ioctl(stdio[0], termios.TIOCSCTTY, 0)
            for target, fd in enumerate(stdio):
                os.dup2(fd, target)
            os.chdir(request["cwd"])
            env = dict(os.environ, **request["env"])
            os.execvpe(request["argv"][0], request["argv"], env)
        except OSError as error:
            os.write(2, f"{request['argv'][0]}: {error.strerror}\n".encode())
        os._exit(127)

    def feed(self, data):
        """Queues input for the command; empty data ends it."""
        if data:
            self.pending += data
        else:
            self.stdin_ended = True
        self.flush()

    def flush(self):
        """Writes as much queued input as the command takes now."""
        if self.stdin is None:
            return
        try:
            while self.pending:
                del self.pending[: os.write(self.stdin, self.pending)]
        except BlockingIOError:
            return
        except OSError:
            self.pending.clear()
            self.stdin_ended = True
        if self.stdin_ended:
            os.close(self.stdin)
            self.stdin = None

    def signal(self, number):
        """Signals the whole session of the command."""
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass


class Server:
    """The loop over the channel and every session's descriptors."""

    def __init__(self, channel):
        self.channel = channel
        self.frames = wire.Frames()
        self.sessions = {}
        self.poller = select.epoll()
        self.poller.register(channel, select.EPOLLIN)
        self.handlers = {}
        self.start_pid = None

    def send(self, session, kind, payload=b""):
        """Writes one frame; the other end always reads, so this may block."""
        view = memoryview(wire.pack(session, kind, payload))
        while view:
            view = view[os.write(self.channel, view) :]

    def watch(self, fd, handler, events=select.EPOLLIN):
        """Calls handler(fd) when fd is ready."""
        self.handlers[fd] = handler
        self.poller.register(fd, events)

    def unwatch(self, fd):
        """Forgets fd and closes it."""
        del self.handlers[fd]
        self.poller.unregister(fd)
        os.close(fd)

    def adopt(self):
        """As init of a pid namespace, reaps what others leave behind, whenever a child of any kind ends."""
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_write)

        def child_ended(fd):
            os.read(fd, CHUNK)
            self.reap_orphans()

        self.watch(wake_read, child_ended)

    def reap_orphans(self):
        """Reaps ended children up to the first of our own, which its pidfd announces."""
        own = {session.pid for session in self.sessions.values()} | {self.start_pid}
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None or ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, 0)

    def run(self):
        """Serves until the host hangs up."""
        while True:
            for fd, _ in self.poller.poll():
                if fd != self.channel:
                    handler = self.handlers.get(fd)
                    if handler:
                        handler(fd)
                elif not self.read_channel():
                    return

    def read_channel(self):
        """Takes what the host sent; False when it is gone."""
        data = os.read(self.channel, CHUNK)
        for number, kind, payload in self.frames.feed(data):
            if kind == wire.OPEN:
                self.open(number, json.loads(payload))
            elif session := self.sessions.get(number):
                self.control(session, kind, payload)
        return bool(data)

    def control(self, session, kind, payload):
        """Input, signal or resize of a running session."""
        if kind == wire.STDIN:
            session.feed(payload)
            if session.pending and session.stdin not in self.handlers:
                self.handlers[session.stdin] = lambda fd: self.drain(session, fd)
                self.poller.register(session.stdin, select.EPOLLOUT)
        elif kind == wire.SIGNAL:
            session.signal(payload[0])
        elif kind == wire.RESIZE and session.stdin is not None:
            fcntl.ioctl(session.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", *struct.unpack(">HH", payload), 0, 0))

    def drain(self, session, fd):
        """The command's input takes more."""
        self.poller.unregister(fd)
        del self.handlers[fd]
        session.flush()
        if session.pending and session.stdin is not None:
            self.watch(session.stdin, lambda ready: self.drain(session, ready), select.EPOLLOUT)

    def open(self, number, request):
        """Starts a command."""
        session = self.sessions[number] = Session(number, request)
        for fd in session.outputs:
            self.watch(fd, lambda ready: self.output(session, ready))
        self.watch(session.pidfd, lambda _: self.reap(session))

    def output(self, session, fd):
        """Passes on what the command wrote."""
        try:
            data = os.read(fd, CHUNK)
        except OSError as error:
            if error.errno != errno.EIO:  # how a terminal says that its last user is gone
                raise
            data = b""
        if data:
            self.send(session.number, session.outputs[fd], data)
        else:
            del session.outputs[fd]
            self.unwatch(fd)

    def reap(self, session):
        """The command ended: pass on what is left of its output, then its status."""
        _, status = os.waitpid(session.pid, 0)
        # What it left running may hold its streams; a command is over when its process is.
        for fd in list(session.outputs):
            os.set_blocking(fd, False)
            try:
                while fd in session.outputs:
                    self.output(session, fd)
            except BlockingIOError:
                del session.outputs[fd]
                self.unwatch(fd)
        self.unwatch(session.pidfd)
        if session.stdin is not None:
            if session.stdin in self.handlers:
                self.unwatch(session.stdin)
            else:
                os.close(session.stdin)
        del self.sessions[session.number]
        code = os.waitstatus_to_exitcode(status)
        self.send(session.number, wire.EXIT, bytes([code if code >= 0 else 128 - code]))
        self.reap_orphans()

    def start_node(self, script):
        """Runs the start script, its lines going to the host as progress."""
        out_read, out_write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
            os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
            os.dup2(out_write, 1)
            os.dup2(out_write, 2)
            os.execvp(script, [script])
        os.close(out_write)
        self.start_pid = pid
        pidfd = os.pidfd_open(pid)
        line = bytearray()

        def progress(fd):
            data = os.read(fd, CHUNK)
            if not data:
                self.unwatch(fd)
            line.extend(data)
            while b"\n" in line:
                text, _, rest = bytes(line).partition(b"\n")
                line[:] = rest
                self.send(wire.NODE, wire.PROGRESS, text)

        def ended(fd):
            _, status = os.waitpid(pid, 0)
            self.start_pid = None
            self.reap_orphans()
            code = os.waitstatus_to_exitcode(status)
            self.unwatch(fd)
            if out_read in self.handlers:
                os.set_blocking(out_read, False)
                try:
                    while out_read in self.handlers:
                        progress(out_read)
                except BlockingIOError:
                    self.unwatch(out_read)
            if code == 0:
                self.send(wire.NODE, wire.READY)
            else:
                self.send(wire.NODE, wire.FAILED, f"{script} ended with status {code}".encode())

        self.watch(out_read, progress)
        self.watch(pidfd, ended)


def main():
    """Serves the channel named on the command line."""
    channel, script = sys.argv[1:]
    fd = int(channel[3:]) if channel.startswith("fd:") else os.open(channel, os.O_RDWR | os.O_CLOEXEC)
    os.set_inheritable(fd, False)
    server = Server(fd)
    if os.getpid() == 1:
        server.adopt()
    server.start_node(script)
    server.run()


main()
