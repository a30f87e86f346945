"""What a test node runs on: this host where its KVM boots Linux, else a VM under QEMU's emulation.

The emulated machine is an AMD processor with SVM, so that kvm_amd works in it as on bare metal. One processor and one
emulation thread: with two, one guest boot in four hangs in the emulator's interrupt delivery (QEMU 7.2 and 10.0). No
XSAVE, and so no AVX: the emulator lets a guest's XSETBV past KVM, whose CPUID then contradicts it, and the guest's kernel
warns and does without.
"""

import asyncio
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import subprocess

TREE = pathlib.Path(__file__).resolve().parents[3]
NODE = TREE / "tests" / "node"
BUILD = TREE / "build"
VENV = BUILD / "venv" / "bin"
QEMU = "qemu-system-x86_64"
MEMORY = "8G"
# Drivers that udev would load for devices the node does not use; under emulation each costs up to a second.
UNUSED_DRIVERS = (
    "aesni_intel", "ahci", "button", "crc32_pclmul", "crct10dif_pclmul", "evdev", "ghash_clmulni_intel", "i2c_i801",
    "i6300esb", "iTCO_wdt", "intel_rapl_msr", "libata", "lpc_ich", "pcspkr", "psmouse", "qemu_fw_cfg", "serio_raw",
    "sha1_ssse3", "sha256_ssse3", "sha512_ssse3", "sr_mod",
)  # fmt: skip


class SetupError(Exception):
    """The node cannot be started here; the text says why and what to do."""


def kernel():
    """The newest Debian 6.12 kernel whose modules are installed."""
    def version(path):
        return [int(n) for n in re.findall(r"\d+", path.name)]

    found = [
        image
        for image in sorted(pathlib.Path("/boot").glob("vmlinuz-6.12.*"), key=version)
        if pathlib.Path("/lib/modules", image.name.removeprefix("vmlinuz-")).is_dir()
    ]
    if not found:
        raise SetupError("no 6.12 kernel with modules under /boot; run `make setup` (installs linux-image-6.12-amd64)")
    return found[-1]


def kvm_boots_linux():
    """Whether this host's /dev/kvm boots the guest kernel.

    That it opens, or creates a VM, proves nothing: there are modules behind it that need neither VMX nor SVM and run
    only guests that were made for them. So a processor without either is out, and with one a boot decides.
    """
    if not re.search(r"^flags\s*:.* (vmx|svm)\b", pathlib.Path("/proc/cpuinfo").read_text(encoding="ascii"), re.MULTILINE):
        return False
    vmm, image, init = BUILD / "bin" / "bulkhead-vmm", BUILD / "vmlinux", BUILD / "reboot.cpio"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK) or not all(path.exists() for path in (vmm, image, init)):
        return False
    command = [vmm, "run", "--kernel", image, "--initrd", init, "--vcpus", "1", "--memory", "128"]
    try:
        # A boot takes a fraction of a second on hardware; one that takes 20 will not come to an end.
        return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def kind():
    """`host` or `emulated`: what a node started now would run on. BULKHEAD_NODE decides if it is set."""
    wanted = os.environ.get("BULKHEAD_NODE", "")
    if wanted not in ("", "host", "emulated"):
        raise SetupError("BULKHEAD_NODE must be `host` or `emulated`")
    if wanted != "emulated" and kvm_boots_linux():
        return "host"
    if wanted == "host":
        raise SetupError("BULKHEAD_NODE=host, but /dev/kvm does not boot the guest kernel (or it is not built: `make build`)")
    if shutil.which(QEMU) and (VENV / "vng").exists():
        return "emulated"
    raise SetupError(
        "no test node: /dev/kvm does not boot the guest kernel here, and QEMU with virtme-ng is not installed; "
        "enable KVM or run `make setup`"
    )


class Machine:
    """The process that is the node."""

    def __init__(self, state):
        self.state = state
        self.console = state / "console.log"
        self.process = None
        self.cgroup = None

    async def start(self):
        """Starts it and returns the socket of its control channel."""
        if kind() == "host":
            return await self._start_host()
        return await self._start_emulated()

    async def _start_host(self):
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        self.cgroup = pathlib.Path(f"/sys/fs/cgroup/bulkhead-node-{os.getpid()}")
        await self._spawn([NODE / "lib" / "enter-host", self.cgroup, f"fd:{theirs.fileno()}", self.state], [theirs.fileno()])
        theirs.close()
        return ours

    async def _start_emulated(self):
        path = self.state / "channel.sock"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(path))
        listener.listen(1)
        listener.setblocking(False)
        qemu_options = [
            "-nodefaults -machine q35,sata=off,smbus=off -accel tcg,thread=single -cpu EPYC,+svm,-xsave,-avx,-avx2,-f16c,-fma",
            f"-chardev socket,id=bulkhead,path={path}",
            "-device virtio-serial-pci,id=bulkhead-bus",
            "-device virtserialport,bus=bulkhead-bus.0,name=bulkhead.control,chardev=bulkhead",
            # /usr once more, this time cached: it does not change while a node runs.
            "-fsdev local,id=usr,path=/usr,security_model=none,readonly=on,multidevs=remap",
            "-device virtio-9p-pci,fsdev=usr,mount_tag=usr",
        ]
        command = [
            VENV / "vng", "--run", kernel(), "--disable-kvm", "--force-9p",
            "--cpus", "1", "--memory", MEMORY, "--user", "root", "--cwd", TREE, "--name", "node",
            f"--rwdir={BUILD}", f"--append=modprobe.blacklist={','.join(UNUSED_DRIVERS)}",
            *(f"--qemu-opts={option}" for option in qemu_options),
            "--", NODE / "lib" / "enter", "emulated", "/dev/virtio-ports/bulkhead.control", self.state,
        ]  # fmt: skip
        await self._spawn(command, [])
        accept = asyncio.create_task(asyncio.get_running_loop().sock_accept(listener))
        ended = asyncio.create_task(self.process.wait())
        await asyncio.wait([accept, ended], return_when=asyncio.FIRST_COMPLETED)
        listener.close()
        if not accept.done():
            raise SetupError(f"the node's machine did not start, see {self.console}")
        channel, _ = accept.result()
        return channel

    async def _spawn(self, command, fds):
        env = dict(os.environ, PATH=f"{VENV}:{os.environ['PATH']}")
        with open(self.console, "wb") as console:
            self.process = await asyncio.create_subprocess_exec(
                *map(os.fspath, command), stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                pass_fds=fds, env=env, start_new_session=True,
            )  # fmt: skip

    async def wait(self):
        """Returns when the machine is gone."""
        await self.process.wait()

    async def stop(self):
        """Ends it; nothing in it is worth an orderly shutdown."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        await self.process.wait()
        if self.cgroup is not None:
            self._remove_cgroup()

    def _remove_cgroup(self):
        """Ends what is left in the host node's cgroup and removes it with all below it."""
        kill = self.cgroup / "cgroup.kill"
        if not kill.exists():
            return
        kill.write_text("1")
        with open(self.cgroup / "cgroup.events", encoding="ascii") as events:
            poller = select.poll()
            poller.register(events, select.POLLPRI)
            # A killed process is gone in milliseconds, unless the kernel holds it; then its cgroup stays.
            while "populated 1" in events.read() and poller.poll(5000):
                events.seek(0)
        for directory, _, _ in os.walk(self.cgroup, topdown=False):
            try:
                os.rmdir(directory)
            except OSError as error:
                print(f"cannot remove {directory}: {error.strerror}", flush=True)
