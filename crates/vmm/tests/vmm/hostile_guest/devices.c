/* Requests that are well formed and ask for what a guest must not have, device by device. */
#include "scenarios.h"

#define IO_ERROR 1
#define UNSUPPORTED 2

static void out_of_bounds(struct device *device, u64 sectors)
{
	const struct {
		const char *name;
		u32 kind, len;
		u64 sector;
	} wrong[] = {
		{"a read behind the end", BLOCK_IN, 512, sectors},
		{"a write behind the end", BLOCK_OUT, 512, sectors},
		{"a write across the end", BLOCK_OUT, 1024, sectors - 1},
		{"a write at the last sector number", BLOCK_OUT, 512, ~0ull},
		{"a read whose end wraps", BLOCK_IN, 4096, ~0ull - 1},
		{"a sector whose byte offset wraps", BLOCK_OUT, 512, 1ull << 55},
		{"half a sector", BLOCK_OUT, 256, 0},
		{"a sector and a byte", BLOCK_IN, 513, 0},
	};
	for (u64 i = 0; i < ARRAY_SIZE(wrong); i++) {
		u8 status = block_request(device, wrong[i].kind, wrong[i].sector, scratch, wrong[i].len);
		check(status == IO_ERROR, "block refuses", wrong[i].name, 0);
	}
	check(block_request(device, BLOCK_IN, 0, ram_end - 512, 1024) == IO_ERROR, "block refuses",
	      "data across the end of memory", 0);
	check(block_request(device, BLOCK_OUT, 0, SLOTS_START, 512) == IO_ERROR, "block refuses", "data in the gap", 0);
	check(block_request(device, BLOCK_OUT, 0, scratch, 0x80000000) == IO_ERROR, "block refuses",
	      "2 GiB in one request", 0);
	check(block_request(device, BLOCK_DISCARD, 0, scratch, 16) == UNSUPPORTED, "block does not", "discard", 0);
	check(block_request(device, BLOCK_ZEROES, 0, scratch, 16) == UNSUPPORTED, "block does not", "write zeroes", 0);
}

/* A disk whose first sector becomes that of an image format, with a backing file of the host, stays what it was. */
static void looks_like_an_image(struct device *device, u64 sectors)
{
	static u8 header[512], back[512];
	memcpy(header, "QFI\xfb\0\0\0\3\0\0\0\0\0\0\1\0\0\0\0\x0b", 20);
	memcpy(header + 256, "/etc/passwd", 11);
	bool same = block_request(device, BLOCK_OUT, 0, (u64)header, 512) == 0 && start_device(device);
	same = same && read64(device->base + CONFIG) == sectors;
	same = same && block_request(device, BLOCK_IN, 0, (u64)back, 512) == 0 && memcmp(header, back, 512) == 0;
	expect(same, "block is raw, whatever is on it");
}

void block_limits(void)
{
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		if (device->kind != BLOCK || !start_device(device))
			continue;
		u64 sectors = read64(device->base + CONFIG);
		if (is_read_only(device)) {
			expect(block_request(device, BLOCK_OUT, 0, scratch, 512) == IO_ERROR,
			       "block refuses a write to what is read-only");
			expect(block_request(device, BLOCK_IN, 0, scratch, 512) == 0, "block reads what is read-only");
			continue;
		}
		out_of_bounds(device, sectors);
		looks_like_an_image(device, sectors);
		expect(honest(device), "block works after requests out of bounds");
	}
}

static void refused(int error, const char *what, const char *name)
{
	if (!check(error > 0, "share refuses", what, name)) {
		put_number((u64)error);
		put_char('\n');
	}
}

static void bad_names(struct device *device, u64 file)
{
	static const char *const names[] = {
		"..", ".", "", "/escaped", "../escaped", "a/escaped", "../../../../tmp/escaped"};
	u32 create[4] = {01102, 0100600, 0, 0}, node[4] = {0100600, 0, 0, 0}, directory[2] = {0700, 0};
	u64 root = fuse_volume;
	for (u64 i = 0; i < ARRAY_SIZE(names); i++) {
		const char *name = names[i];
		refused(fuse_named(device, FUSE_LOOKUP, fuse_volume, 0, 0, name, 0), "to look up", name);
		refused(fuse_named(device, FUSE_CREATE, fuse_volume, create, sizeof create, name, 0), "to create", name);
		refused(fuse_named(device, FUSE_MKNOD, fuse_volume, node, sizeof node, name, 0), "to make a node", name);
		refused(fuse_named(device, FUSE_MKDIR, fuse_volume, directory, sizeof directory, name, 0),
			"to make a directory", name);
		refused(fuse_named(device, FUSE_SYMLINK, fuse_volume, 0, 0, name, "target"), "to make a link", name);
		refused(fuse_named(device, FUSE_LINK, fuse_volume, &file, 8, name, 0), "to link", name);
		refused(fuse_named(device, FUSE_RENAME, fuse_volume, &root, 8, "hello", name), "to rename to", name);
		refused(fuse_named(device, FUSE_RENAME, fuse_volume, &root, 8, name, "b"), "to rename", name);
		refused(fuse_named(device, FUSE_UNLINK, fuse_volume, 0, 0, name, 0), "to remove", name);
		refused(fuse_named(device, FUSE_RMDIR, fuse_volume, 0, 0, name, 0), "to remove a directory", name);
	}
}

static void links_out(struct device *device, const char *name, const char *target)
{
	u32 create[4] = {01102, 0100600, 0, 0}, open[2] = {01001, 0};
	if (fuse_named(device, FUSE_SYMLINK, fuse_volume, 0, 0, name, target) != 0) {
		check(false, "share makes a symbolic link", name, 0);
		return;
	}
	u64 node = fuse_word(0);
	refused(fuse(device, FUSE_OPEN, node, open, sizeof open), "to open the link", name);
	refused(fuse_named(device, FUSE_LOOKUP, node, 0, 0, "secret", 0), "to look behind the link", name);
	refused(fuse_named(device, FUSE_CREATE, node, create, sizeof create, "escaped", 0), "to create behind the link",
		name);
	refused(fuse_named(device, FUSE_CREATE, fuse_volume, create, sizeof create, name, 0), "to create over the link",
		name);
}

static void device_nodes(struct device *device)
{
	const struct {
		const char *name;
		u32 mode, number;
	} nodes[] = {{"disk", 0060600, 0x800}, {"memory", 0020600, 0x101}, {"zero", 0020600, 0x105}};
	for (u64 i = 0; i < ARRAY_SIZE(nodes); i++) {
		u32 body[4] = {nodes[i].mode, nodes[i].number, 0, 0};
		refused(fuse_named(device, FUSE_MKNOD, fuse_volume, body, sizeof body, nodes[i].name, 0), "a device node",
			nodes[i].name);
	}
}

/* Numbers of nodes and handles that the server has not given out, and forgets of more than there was. */
static void made_up_numbers(struct device *device)
{
	static const u64 numbers[] = {0, 2000, 1ull << 31, 1ull << 32, 1ull << 63, ~0ull};
	u32 open[2] = {0, 0};
	for (u64 i = 0; i < ARRAY_SIZE(numbers); i++) {
		u64 read[5] = {numbers[i], 0, 4096, 0, 0}, release[3] = {numbers[i], 0, 0},
		    forget[1] = {numbers[i] | 1ull << 60};
		refused(fuse(device, FUSE_OPEN, numbers[i], open, sizeof open), "to open", "a node that is not there");
		refused(fuse(device, FUSE_READ, FUSE_ROOT, read, sizeof read), "to read",
			"from a handle that is not there");
		refused(fuse(device, FUSE_RELEASE, FUSE_ROOT, release, sizeof release), "to close",
			"a handle that is not there");
		fuse(device, FUSE_FORGET, numbers[i], forget, sizeof forget);
	}
}

static bool reads_hello(struct device *device)
{
	u32 open[2] = {0, 0};
	if (fuse_named(device, FUSE_LOOKUP, fuse_volume, 0, 0, "hello", 0) != 0)
		return false;
	u64 node = fuse_word(0);
	if (fuse(device, FUSE_OPEN, node, open, sizeof open) != 0)
		return false;
	u64 read[5] = {fuse_word(0), 0, 4096, 0, 0};
	return fuse(device, FUSE_READ, node, read, sizeof read) == 0 &&
	       memcmp(fuse_reply + FUSE_OUT_HEADER, "hello", 5) == 0;
}

void share_limits(void)
{
	struct device *device = device_of(FS);
	if (!device || !expect(start_device(device) && fuse_init(device) == 0, "share starts"))
		return;
	expect(fuse_named(device, FUSE_LOOKUP, fuse_volume, 0, 0, "hello", 0) == 0, "share has a file");
	bad_names(device, fuse_word(0));
	/* The directories above volumes are the host's: it mounts there. */
	u32 create[4] = {01102, 0100600, 0, 0};
	refused(fuse_named(device, FUSE_CREATE, FUSE_ROOT, create, sizeof create, "planted", 0), "to create", "beside volumes");
	refused(fuse_named(device, FUSE_SYMLINK, FUSE_ROOT, 0, 0, "planted", "/etc"), "to make a link", "beside volumes");
	/* The host has a file `secret` beside the share. */
	links_out(device, "up", "..");
	links_out(device, "up-to-secret", "../../secret");
	links_out(device, "root", "/");
	device_nodes(device);
	made_up_numbers(device);
	expect(reads_hello(device), "share still has its file");
	/* The root itself: who forgets that has no share any more, until the next start. */
	u64 forget[1] = {~0ull};
	fuse(device, FUSE_FORGET, FUSE_ROOT, forget, sizeof forget);
	revive(device, "its root was forgotten");
}

/* A file that is opened until the server has enough of it. */
void hoard(void)
{
	struct device *device = device_of(FS);
	u32 create[4] = {01102, 0100600, 0, 0}, open[2] = {0, 0};
	revive_all("boot");
	if (!device || fuse_named(device, FUSE_CREATE, fuse_volume, create, sizeof create, "hoarded", 0) != 0) {
		expect(false, "share makes a file");
		return;
	}
	u64 node = fuse_word(0);
	expect(true, "the hoarding begins");
	u64 handles = 1;
	int error;
	while ((error = fuse(device, FUSE_OPEN, node, open, sizeof open)) == 0)
		handles++;
	expect(error > 0, "share refuses more handles");
	put("handles ");
	put_number(handles);
	put_char('\n');
	expect(fuse_named(device, FUSE_LOOKUP, fuse_volume, 0, 0, "hoarded", 0) == 0,
	       "share still looks up what it has open");
	for (int i = 0; i < device_count; i++)
		if (&devices[i] != device)
			revive(&devices[i], "handles were hoarded");
	revive(device, "handles were hoarded");
}

static void rng_limits(struct device *device)
{
	struct part beyond[] = {{scratch, 0xffffffff, true}};
	u32 len;
	expect(exchange(device, 0, beyond, 1, &len) && len <= 65536, "rng gives little to a chain larger than memory");
	struct part gap[] = {{SLOTS_START, 64, true}};
	expect(exchange(device, 0, gap, 1, &len) && len == 0, "rng gives nothing to a buffer in the gap");
	expect(honest(device), "rng works after them");
}

static void balloon_limits(struct device *device)
{
	struct part parts[] = {
		{ram_end - 4096, 0x10000, true},
		{ram_end, 4096, true},
		{SLOTS_START, 4096, true},
		{scratch + 1, 4096, true},
		{scratch, 4097, true},
		{~0ull - 4095, 4096, true},
		{scratch + 0x1000, 0xfffff000, true},
		{scratch + 0x1000, 0, true},
		{scratch + 0x1000, 4096, false},
	};
	write64(scratch, 7);
	write64(scratch + 0x1000, 7);
	write64(ram_end - 8, 7);
	u32 len;
	bool answered = true;
	for (u64 i = 0; i < ARRAY_SIZE(parts); i++)
		answered = exchange(device, 2, &parts[i], 1, &len) && answered;
	expect(answered, "balloon answers reports of what it cannot take");
	expect(read64(scratch) == 7 && read64(scratch + 0x1000) == 7 && read64(ram_end - 8) == 7,
	       "balloon leaves what it cannot take");
	expect(honest(device), "balloon works after them");
}

#define MEM_BLOCK (2ull << 20)

static void mem_limits(struct device *device)
{
	enum { ACK, NACK, BUSY, ERROR };
	u64 region = read64(device->base + CONFIG + 24), requested = read64(device->base + MEM_REQUESTED);
	expect(mem_request(device, MEM_UNPLUG_ALL, 0, 0) == ACK, "mem unplugs everything");
	u16 all = (u16)(region / MEM_BLOCK), most = (u16)(requested / MEM_BLOCK);
	expect(mem_request(device, MEM_PLUG, HOTPLUG_START, all) == NACK, "mem refuses more than was asked for");
	const struct {
		u64 address;
		u16 count;
	} wrong[] = {
		{0, 1},
		{ram_end - MEM_BLOCK, 1},
		{HOTPLUG_START - MEM_BLOCK, 1},
		{HOTPLUG_START + 1, 1},
		{HOTPLUG_START + region, 1},
		{HOTPLUG_START + region - MEM_BLOCK, 2},
		{HOTPLUG_START, 0},
		{HOTPLUG_START, 0xffff},
		{~0ull - MEM_BLOCK + 1, 1},
	};
	bool refused_all = true;
	for (u64 i = 0; i < ARRAY_SIZE(wrong); i++)
		for (u16 kind = MEM_PLUG; kind <= MEM_STATE; kind++)
			if (kind != MEM_UNPLUG_ALL)
				refused_all = mem_request(device, kind, wrong[i].address, wrong[i].count) == ERROR &&
					      refused_all;
	expect(refused_all, "mem refuses what is not in its region");
	expect(read64(HOTPLUG_START) == ~0ull, "what is not plugged is not there");
	expect(mem_request(device, MEM_PLUG, HOTPLUG_START, most) == ACK, "mem plugs what was asked for");
	write64(HOTPLUG_START, 0x5ec2e7);
	expect(mem_request(device, MEM_PLUG, HOTPLUG_START, 1) == ERROR, "mem refuses to plug twice");
	expect(mem_request(device, MEM_UNPLUG, HOTPLUG_START, most) == ACK, "mem unplugs it");
	expect(read64(HOTPLUG_START) == ~0ull, "what was unplugged is gone");
	expect(mem_request(device, MEM_PLUG, HOTPLUG_START, 1) == ACK, "mem plugs it again");
	expect(read64(HOTPLUG_START) == 0, "what is plugged again is empty");
	mem_request(device, MEM_UNPLUG_ALL, 0, 0);
	expect(honest(device), "mem works after all that");
}

void memory_limits(void)
{
	struct device *rng = device_of(RNG), *balloon = device_of(BALLOON), *mem = device_of(MEM);
	if (rng && revive(rng, "boot"))
		rng_limits(rng);
	if (balloon && revive(balloon, "boot"))
		balloon_limits(balloon);
	if (mem && revive(mem, "boot"))
		mem_limits(mem);
}

/* Waits for the host, which asks for another size of the virtio-mem device. */
void wait_for_host(void)
{
	struct device *mem = device_of(MEM);
	u32 requested = get(mem, MEM_REQUESTED);
	while (get(mem, MEM_REQUESTED) == requested)
		pause();
}

/* Frames that no network takes; each is dropped and its buffers come back. */
static bool send_odd_frames(struct device *device)
{
	static u8 header[12];
	const struct part odd[][2] = {
		{{scratch, 5, false}, {scratch, 0, false}},
		{{(u64)header, 12, false}, {scratch, 13, false}},
		{{(u64)header, 12, false}, {scratch, 66000, false}},
		{{(u64)header, 12, false}, {scratch, 1 << 22, false}},
		{{(u64)header, 12, false}, {scratch, 60, true}},
		{{(u64)header, 12, false}, {SLOTS_START, 60, false}},
	};
	u32 len;
	bool returned = true;
	for (u64 i = 0; i < ARRAY_SIZE(odd); i++)
		returned = exchange(device, 1, odd[i], 2, &len) && returned;
	/* Offloads that were not agreed on, or make no sense for the frame. */
	for (u32 i = 0; i < 200; i++) {
		for (u32 byte = 0; byte < sizeof header; byte++)
			header[byte] = (u8)(below(2) ? random32() : 0);
		struct part parts[] = {{(u64)header, sizeof header, false}, {scratch, below(3000), false}};
		returned = exchange(device, 1, parts, 2, &len) && returned;
	}
	return returned;
}

/* The host sends more than its queue holds, to a guest that offers no buffer; when it does, frames come. */
void frames(void)
{
	enum { ENOUGH = 100 };
	struct device *device = device_of(NET);
	if (!device || !device_of(MEM) || !revive(device, "boot"))
		return;
	expect(true, "the host may send");
	wait_for_host();
	int received = 0;
	for (; received < ENOUGH; received++) {
		struct part part = {scratch, 2048, true};
		u32 len;
		if (!exchange(device, 0, &part, 1, &len) || len < 12 + 14 || len > 2048)
			break;
	}
	expect(received == ENOUGH, "net receives after a flood that it had no room for");
	expect(send_odd_frames(device), "net drops odd frames");
	revive(device, "odd frames");
}

static struct vsock_header reply_to(const struct vsock_header *request, u16 op)
{
	return (struct vsock_header){.source = GUEST_CID,
				     .target = HOST_CID,
				     .source_port = request->target_port,
				     .target_port = request->source_port,
				     .type = 1,
				     .op = op,
				     .buffer = 65536};
}

/* Waits for a packet of an operation, past others. */
static bool await(struct device *device, u16 op, struct vsock_header *header, u8 *payload, u32 room)
{
	for (int i = 0; i < 64; i++) {
		if (!vsock_receive(device, header, payload, room))
			return false;
		if (header->op == op)
			return true;
		if (header->op == VSOCK_RST)
			return false;
	}
	return false;
}

/* The host connects twice: to an honest peer, and to one that sends more than it was allowed to. */
void vsock_peer(void)
{
	struct device *device = device_of(VSOCK);
	if (!device || !revive(device, "boot"))
		return;
	struct vsock_header in, out;
	u8 text[4];
	expect(true, "the host may connect");
	if (!expect(await(device, VSOCK_REQUEST, &in, 0, 0), "vsock gets the host's request"))
		return;
	/* Strays of every kind around it: they may not harm the connection. */
	for (u16 op = 0; op < 12; op++) {
		struct vsock_header stray = reply_to(&in, op);
		stray.source_port++;
		vsock_send(device, &stray, 0);
	}
	out = reply_to(&in, VSOCK_RESPONSE);
	vsock_send(device, &out, 0);
	bool pinged = false;
	/* The strays are answered with resets, on other ports. */
	for (int i = 0; i < 64 && !pinged; i++) {
		struct vsock_header packet;
		pinged = vsock_receive(device, &packet, text, sizeof text) && packet.op == VSOCK_RW && packet.len == 4;
	}
	expect(pinged && memcmp(text, "ping", 4) == 0, "vsock gets the host's bytes");
	out = reply_to(&in, VSOCK_RW);
	out.len = 4;
	out.forwarded = 4;
	expect(vsock_send(device, &out, (u64) "pong"), "vsock takes an answer");

	expect(true, "the host may connect again");
	struct vsock_header flooded;
	if (!expect(await(device, VSOCK_REQUEST, &flooded, 0, 0), "vsock gets the second request"))
		return;
	out = reply_to(&flooded, VSOCK_RESPONSE);
	vsock_send(device, &out, 0);
	/* Nobody reads there: what the socket and the device's buffer take is less than this. */
	out = reply_to(&flooded, VSOCK_RW);
	out.len = 65536;
	bool taken = true;
	for (int i = 0; i < 1000; i++)
		taken = vsock_send(device, &out, scratch) && taken;
	expect(taken, "vsock takes every packet");
	struct vsock_header answer;
	expect(!await(device, VSOCK_RESPONSE, &answer, 0, 0) && answer.op == VSOCK_RST &&
		       answer.target_port == flooded.target_port,
	       "vsock ends a connection that breaks its credit");
	out = reply_to(&in, VSOCK_RW);
	out.len = 4;
	out.forwarded = 4;
	expect(vsock_send(device, &out, (u64) "pong"), "vsock goes on with the other");
	/* Closed by both flags; the device's reset says that the host has it all. */
	out = reply_to(&in, VSOCK_SHUTDOWN);
	out.flags = 3;
	vsock_send(device, &out, 0);
	await(device, VSOCK_RESPONSE, &answer, 0, 0);
	expect(answer.op == VSOCK_RST && answer.target_port == in.target_port, "vsock closes the other");
	revive(device, "broken credit");
}

/* Output that nobody reads, far more than any pipe holds. What became of it is written to the disk. */
void chatter(void)
{
	struct device *console = device_of(CONSOLE), *block = device_of(BLOCK);
	if (!console || !block || !revive(console, "boot") || !revive(block, "boot"))
		return;
	bool taken = true;
	memset((void *)scratch, 'c', 0x10000);
	for (int i = 0; i < 400; i++) {
		struct part part = {scratch, 0x10000, false};
		u32 len;
		taken = exchange(console, 1, &part, 1, &len) && taken;
	}
	expect(taken, "console takes output that nobody reads");
	for (int i = 0; i < 200000; i++)
		put_char(i % 80 ? 's' : '\n');
	memset((void *)scratch, 0, 512);
	memcpy((void *)scratch, "survived", 8);
	taken = honest(console) && taken && block_request(block, BLOCK_OUT, 0, scratch, 512) == 0;
}
