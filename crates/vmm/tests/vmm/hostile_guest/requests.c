/* See requests.h. */
#include "requests.h"

static u8 request[8192] __attribute__((aligned(4096)));
static u8 reply[8192] __attribute__((aligned(4096)));

static bool console_works(struct device *device)
{
	static const char text[] = "console works\n";
	struct part parts[] = {{(u64)text, sizeof text - 1, false}};
	u32 len;
	return exchange(device, 1, parts, 1, &len);
}

static bool rng_works(struct device *device)
{
	struct part parts[] = {{(u64)reply, 64, true}};
	u32 len;
	memset(reply, 0, 64);
	if (!exchange(device, 0, parts, 1, &len) || len != 64)
		return false;
	for (int i = 0; i < 64; i++)
		if (reply[i])
			return true;
	return false;
}

/* What was reported is the host's, and reads as zero afterwards. */
static bool balloon_works(struct device *device)
{
	write64(scratch, 7);
	struct part parts[] = {{scratch, 4096, true}};
	u32 len;
	return exchange(device, 2, parts, 1, &len) && read64(scratch) == 0;
}

static bool net_works(struct device *device)
{
	/* Twelve bytes of header, then a frame to nobody from nobody, of an experimental type. */
	memset(request, 0, 72);
	memset(request + 12, 0xff, 6);
	request[12 + 6] = 2;
	request[12 + 12] = 0x88;
	request[12 + 13] = 0xb5;
	struct part parts[] = {{(u64)request, 72, false}};
	u32 len;
	return exchange(device, 1, parts, 1, &len);
}

u8 block_request(struct device *device, u32 kind, u64 sector, u64 address, u32 len)
{
	static u8 status;
	u32 header[4] = {kind, 0, (u32)sector, (u32)(sector >> 32)};
	bool in = kind == BLOCK_IN || kind == BLOCK_GET_ID;
	struct part parts[3] = {{(u64)header, 16, false}, {address, len, in}, {(u64)&status, 1, true}};
	u32 used;
	status = 0xff;
	if (len == 0)
		parts[1] = parts[2];
	return exchange(device, 0, parts, len ? 3 : 2, &used) ? *(volatile u8 *)&status : 0xff;
}

bool is_read_only(struct device *device)
{
	set(device, DEVICE_FEATURES_SEL, 0);
	return get(device, DEVICE_FEATURES) & 1u << 5;
}

static bool block_works(struct device *device)
{
	if (is_read_only(device))
		return block_request(device, BLOCK_IN, 1, (u64)reply, 512) == 0;
	static u8 turn;
	memset(request, ++turn, 512);
	memset(reply, 0, 512);
	return block_request(device, BLOCK_OUT, 1, (u64)request, 512) == 0 &&
	       block_request(device, BLOCK_FLUSH, 0, 0, 0) == 0 &&
	       block_request(device, BLOCK_IN, 1, (u64)reply, 512) == 0 && memcmp(request, reply, 512) == 0;
}

u16 mem_request(struct device *device, u16 kind, u64 address, u16 count)
{
	u16 body[12] = {kind};
	memcpy(body + 4, &address, 8);
	body[8] = count;
	static u16 answer[8];
	struct part parts[] = {{(u64)body, 24, false}, {(u64)answer, 10, true}};
	u32 len;
	answer[0] = 0xffff;
	if (!exchange(device, 0, parts, 2, &len))
		return 0xffff;
	return *(volatile u16 *)answer;
}

/* A block comes, holds what is written to it, and goes. */
static bool mem_works(struct device *device)
{
	if (mem_request(device, MEM_UNPLUG_ALL, 0, 0) != 0 || mem_request(device, MEM_PLUG, HOTPLUG_START, 1) != 0)
		return false;
	write64(HOTPLUG_START + 0x1000, 0x1234567890);
	bool held = read64(HOTPLUG_START + 0x1000) == 0x1234567890;
	return mem_request(device, MEM_UNPLUG, HOTPLUG_START, 1) == 0 && held;
}

u8 fuse_reply[FUSE_OUT_HEADER + FUSE_BODY] __attribute__((aligned(4096)));

u64 fuse_word(u32 offset)
{
	u64 word;
	memcpy(&word, fuse_reply + FUSE_OUT_HEADER + offset, 8);
	return word;
}

int fuse(struct device *device, u32 opcode, u64 node, const void *body, u32 len)
{
	static u64 unique;
	u32 head[10] = {FUSE_IN_HEADER + len, opcode};
	unique++;
	memcpy(head + 2, &unique, 8);
	memcpy(head + 4, &node, 8);
	memcpy(request, head, FUSE_IN_HEADER);
	memcpy(request + FUSE_IN_HEADER, body, len);
	struct part parts[] = {{(u64)request, FUSE_IN_HEADER + len, false}, {(u64)fuse_reply, sizeof fuse_reply, true}};
	u32 used;
	if (!exchange(device, 1, parts, opcode == FUSE_FORGET ? 1 : 2, &used))
		return -1;
	if (opcode == FUSE_FORGET)
		return 0;
	int error;
	memcpy(&error, fuse_reply + 4, 4);
	return used < FUSE_OUT_HEADER || memcmp(fuse_reply + 8, &unique, 8) ? -1 : -error;
}

int fuse_named(struct device *device, u32 opcode, u64 node, const void *body, u32 len, const char *name,
	       const char *more)
{
	static u8 bytes[FUSE_BODY];
	memcpy(bytes, body, len);
	u32 name_len = (u32)strlen(name) + 1;
	memcpy(bytes + len, name, name_len);
	len += name_len;
	if (more) {
		u32 more_len = (u32)strlen(more) + 1;
		memcpy(bytes + len, more, more_len);
		len += more_len;
	}
	return fuse(device, opcode, node, bytes, len);
}

u64 fuse_volume = FUSE_ROOT;

int fuse_init(struct device *device)
{
	/* Version 7.38, FUSE_SUBMOUNTS. */
	u32 body[4] = {7, 38, 0, 1u << 27};
	int error = fuse(device, FUSE_INIT, 0, body, sizeof body);
	if (error == 0 && fuse_named(device, FUSE_LOOKUP, FUSE_ROOT, 0, 0, "volume", 0) == 0)
		fuse_volume = fuse_word(0);
	return error;
}

/* A file is made, written, read and removed. */
static bool fs_works(struct device *device)
{
	/* O_RDWR | O_CREAT | O_TRUNC, a file of mode 0600, no umask. */
	u32 create[4] = {01102, 0100600, 0, 0};
	if (fuse_init(device) != 0 ||
	    fuse_named(device, FUSE_CREATE, fuse_volume, create, sizeof create, "works", 0) != 0)
		return false;
	u64 node = fuse_word(0), handle = fuse_word(FUSE_ENTRY_LEN);
	struct {
		u64 words[5];
		char text[16];
	} write = {{handle, 0, 16, 0, 0}, "share works"};
	u64 read[5] = {handle, 0, 512, 0, 0}, release[3] = {handle, 0, 0}, forget[1] = {1};
	bool right = fuse(device, FUSE_WRITE, node, &write, sizeof write) == 0;
	right = fuse(device, FUSE_READ, node, read, sizeof read) == 0 && right;
	right = right && memcmp(fuse_reply + FUSE_OUT_HEADER, write.text, sizeof write.text) == 0;
	right = fuse(device, FUSE_RELEASE, node, release, sizeof release) == 0 && right;
	right = fuse_named(device, FUSE_UNLINK, fuse_volume, 0, 0, "works", 0) == 0 && right;
	return fuse(device, FUSE_FORGET, node, forget, sizeof forget) == 0 && right;
}

bool vsock_send(struct device *device, const struct vsock_header *header, u64 payload)
{
	struct part parts[] = {{(u64)header, VSOCK_HEADER, false}, {payload, header->len, false}};
	u32 len;
	return exchange(device, 1, parts, header->len ? 2 : 1, &len);
}

bool vsock_receive(struct device *device, struct vsock_header *header, u8 *payload, u32 room)
{
	struct part parts[] = {{(u64)reply, VSOCK_HEADER + 4096, true}};
	u32 len;
	if (!exchange(device, 0, parts, 1, &len) || len < VSOCK_HEADER)
		return false;
	memcpy(header, reply, VSOCK_HEADER);
	u32 copied = header->len < room ? header->len : room;
	if (payload)
		memcpy(payload, reply + VSOCK_HEADER, copied);
	return len == VSOCK_HEADER + header->len;
}

/* A connection that the guest starts is reset. Answers to earlier strays may come first. */
static bool vsock_works(struct device *device)
{
	static u32 port = 5000;
	struct vsock_header header = {.source = GUEST_CID,
				      .target = HOST_CID,
				      .source_port = ++port,
				      .target_port = 9999,
				      .type = 1,
				      .op = VSOCK_REQUEST};
	if (!vsock_send(device, &header, 0))
		return false;
	for (int i = 0; i < 256; i++) {
		struct vsock_header answer;
		if (!vsock_receive(device, &answer, 0, 0))
			return false;
		if (answer.target_port == port)
			return answer.op == VSOCK_RST && answer.source_port == 9999;
	}
	return false;
}

bool honest(struct device *device)
{
	switch (device->kind) {
	case NET:
		return net_works(device);
	case BLOCK:
		return block_works(device);
	case CONSOLE:
		return console_works(device);
	case RNG:
		return rng_works(device);
	case BALLOON:
		return balloon_works(device);
	case VSOCK:
		return vsock_works(device);
	case MEM:
		return mem_works(device);
	case FS:
		return fs_works(device);
	}
	return false;
}

bool revive(struct device *device, const char *after)
{
	return check(start_device(device) && honest(device), device->name, "works after", after);
}

void revive_all(const char *after)
{
	for (int i = 0; i < device_count; i++)
		revive(&devices[i], after);
}
