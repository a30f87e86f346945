"""What the two ends of a test node's control channel say to each other.

The channel is one byte stream (a virtio-serial port, or a socket pair when the node is this host). It carries frames
for many sessions, a session being one command that runs in the node:

    session u32 | kind u8 | length u32 | payload

Session 0 is the node itself.
"""

import struct

HEADER = struct.Struct(">IBI")

# Host to node.
OPEN = 1  # JSON: argv, cwd, env, tty (bool), rows, cols
STDIN = 2  # bytes; empty means end of file
SIGNAL = 3  # u8
RESIZE = 4  # u16 rows, u16 columns

# Node to host.
STDOUT = 16  # bytes
STDERR = 17  # bytes
EXIT = 18  # u8, the shell's convention: 128 + n for signal n
PROGRESS = 19  # session 0: one line of text
READY = 20  # session 0: the node is up
FAILED = 21  # session 0: one line saying why it never will be

# Supervisor's own, between a client and it.
DOWN = 32

NODE = 0


def pack(session, kind, payload=b""):
    """One frame as bytes."""
    return HEADER.pack(session, kind, len(payload)) + payload


class Frames:
    """Splits a byte stream into frames."""

    def __init__(self):
        self.buffer = bytearray()

    def feed(self, data):
        """Takes more of the stream and yields each frame that is complete."""
        self.buffer += data
        while len(self.buffer) >= HEADER.size:
            session, kind, length = HEADER.unpack_from(self.buffer)
            end = HEADER.size + length
            if len(self.buffer) < end:
                return
            payload = bytes(self.buffer[HEADER.size : end])
            del self.buffer[:end]
            yield session, kind, payload
