/*
 * Every queue of every device at once, as fast as it goes: requests that are right, nearly right, and nonsense, changed
 * while the device reads them. It ends when the host asks for another size of the virtio-mem device, or after some
 * rounds if there is none, and then every device has to answer an honest request.
 */
#include "scenarios.h"

/* Rounds before the host is told that the flood is on. */
#define WARM_UP 40
#define ROUNDS_WITHOUT_END 400
#define CHAINS_AT_ONCE 4
#define CHAIN_LEN 4

/* Everything that a chain of the flood names is in the scratch memory: tables, then what is read, then what is written,
 * and behind that is the end of memory. */
#define TABLES scratch
#define HEADERS (scratch + (1ull << 20))
#define BUFFERS (scratch + (4ull << 20))

/* Where a chain may point: into the scratch memory or out of any. */
static u64 odd_address(void)
{
	switch (below(12)) {
	case 0:
		return ram_end - below(64);
	case 1:
		return ram_end + below(1 << 24);
	case 2:
		return ~0ull - below(4096);
	case 3:
		return SLOTS_START + below((u32)(SLOTS * SLOT_STRIDE));
	case 4:
		return HOTPLUG_START + below(256 << 20);
	case 5:
		return random64() | 1ull << 40;
	default:
		return BUFFERS + (u64)below(1 << 20) * 4;
	}
}

static u32 odd_len(void)
{
	static const u32 lens[] = {0,  1,   2,   12,   15,   16,    17,      40,         44,
				   64, 511, 512, 1024, 4096, 65536, 1 << 20, 0xfffffff0, ~0u};
	return below(8) ? lens[below(ARRAY_SIZE(lens))] : random32();
}

/* A number as it may be in a request: none between the small and the absurd, so that no disk of the host is filled. */
static u64 odd_word(void)
{
	switch (below(4)) {
	case 0:
		return below(8);
	case 1:
		return below(1 << 20);
	case 2:
		return random64() | 1ull << 60;
	default:
		return 0;
	}
}

static u32 odd_half(void)
{
	return below(3) ? below(64) : random32() | 1u << 31;
}

static const char *odd_name(void)
{
	static const char *const names[] = {
		"a", "b", "c", "d", "..", ".", "", "../escaped", "/escaped", "a/../../escaped", "a/b"};
	return names[below(ARRAY_SIZE(names))];
}

static u32 put_name(u64 at)
{
	const char *name = odd_name();
	u32 len = (u32)strlen(name) + 1;
	memcpy((void *)at, name, len);
	return len;
}

/* A FUSE request; its length. */
static u32 fuse_request(u64 at)
{
	static const u8 named[][2] = {
		{FUSE_LOOKUP, 0},  {FUSE_SYMLINK, 0},      {FUSE_MKNOD, 16},       {FUSE_MKDIR, 8},
		{FUSE_UNLINK, 0},  {FUSE_RMDIR, 0},        {FUSE_RENAME, 8},       {FUSE_LINK, 8},
		{FUSE_CREATE, 16}, {45 /* RENAME2 */, 16}, {21 /* SETXATTR */, 8},
	};
	u32 len = FUSE_IN_HEADER;
	u32 opcode;
	if (below(3) == 0) {
		u32 which = below(ARRAY_SIZE(named));
		opcode = named[which][0];
		for (u32 i = 0; i < named[which][1]; i += 4, len += 4)
			write32(at + len, odd_half());
		len += put_name(at + len);
		len += put_name(at + len);
	} else {
		opcode = below(8) ? below(54) : random32();
		u32 words = below(10);
		for (u32 i = 0; i < words; i++, len += 8)
			write64(at + len, odd_word());
		if (opcode == FUSE_INIT && below(2)) {
			write32(at + FUSE_IN_HEADER, 7);
			write32(at + FUSE_IN_HEADER + 4, 38);
			write32(at + FUSE_IN_HEADER + 12, 1u << 27 | random32());
			len = FUSE_IN_HEADER + 64;
		}
	}
	write32(at, below(8) ? len : odd_half());
	write32(at + 4, opcode);
	write64(at + 8, random64());
	write64(at + 16, below(3) ? 1 : odd_word());
	write32(at + 24, below(4) ? 0 : odd_half());
	write32(at + 28, below(4) ? 0 : odd_half());
	write64(at + 32, below(8) ? 0 : random64());
	return len;
}

static u32 vsock_packet(u64 at, u32 payload)
{
	struct vsock_header *header = (struct vsock_header *)at;
	header->source = below(16) ? GUEST_CID : random64();
	header->target = below(16) ? HOST_CID : random64();
	header->source_port = below(2) ? below(2048) : random32();
	header->target_port = below(2) ? below(2048) : random32();
	header->len = below(4) ? payload : odd_len();
	header->type = (u16)(below(8) ? 1 : random32());
	header->op = (u16)(below(8) ? below(9) : random32());
	header->flags = odd_half();
	header->buffer = odd_half();
	header->forwarded = odd_half();
	return VSOCK_HEADER;
}

/* A request of the device's kind that is right but for its numbers; the number of buffers. */
static int likely(const struct device *device, u32 queue, u64 header, u64 buffer, struct part *parts)
{
	u32 len = odd_len() & 0xffff;
	switch (device->kind) {
	case NET:
		if (queue == 0) {
			parts[0] = (struct part){buffer, 2048, true};
			return 1;
		}
		for (u32 i = 0; i < 12; i++)
			write8(header + i, below(2) ? 0 : (u8)random32());
		parts[0] = (struct part){header, 12, false};
		parts[1] = (struct part){buffer, len, false};
		return 2;
	case BLOCK: {
		static const u32 kinds[] = {BLOCK_IN,      BLOCK_OUT,    BLOCK_FLUSH, BLOCK_GET_ID,
					    BLOCK_DISCARD, BLOCK_ZEROES, 99};
		u32 kind = kinds[below(ARRAY_SIZE(kinds))];
		write32(header, kind);
		write64(header + 8, odd_word());
		parts[0] = (struct part){header, 16, false};
		parts[1] = (struct part){buffer, len & ~511u, kind == BLOCK_IN || kind == BLOCK_GET_ID};
		parts[2] = (struct part){buffer + 0x10000, 1, true};
		return 3;
	}
	case CONSOLE:
		parts[0] = (struct part){buffer, len, queue == 0};
		return 1;
	case RNG:
		parts[0] = (struct part){buffer, len, true};
		parts[1] = (struct part){buffer, odd_len(), true};
		return 2;
	case BALLOON:
		parts[0] = (struct part){buffer & ~4095ull, below(64) * 4096, true};
		parts[1] = (struct part){odd_address() & ~4095ull, below(1 << 10) * 4096, true};
		return 2;
	case VSOCK:
		if (queue == 1) {
			parts[0] = (struct part){header, vsock_packet(header, len), false};
			parts[1] = (struct part){buffer, len, false};
		} else {
			parts[0] = (struct part){buffer, VSOCK_HEADER, true};
			parts[1] = (struct part){buffer + 64, 4096, true};
		}
		return 2;
	case MEM:
		write64(header, below(8) ? below(5) : random64());
		write64(header + 8, HOTPLUG_START + (u64)below(140) * (2 << 20) + (below(8) ? 0 : random32()));
		write64(header + 16, below(8) ? below(70) : random64());
		parts[0] = (struct part){header, 24, false};
		parts[1] = (struct part){buffer, 10, true};
		return 2;
	case FS:
		parts[0] = (struct part){header, fuse_request(header), false};
		parts[1] = (struct part){buffer, 8192, true};
		return 1 + (below(16) != 0);
	}
	return 0;
}

static void set_descriptor(u64 at, u64 address, u32 len, u16 flags, u16 next)
{
	write64(at, address);
	write32(at + 8, len);
	write16(at + 12, flags);
	write16(at + 14, next);
}

/* A chain in the descriptors from `first` on; what it names is its own part of the scratch memory. */
static void make_chain(struct device *device, struct queue *queue, u16 first)
{
	u64 header = HEADERS + (u64)first * 0x1000, table = TABLES + (u64)first * 64;
	u64 buffer = BUFFERS + (u64)first * 0x10000;
	struct part parts[CHAIN_LEN] = {};
	int count = likely(device, queue->index, header, buffer, parts);
	u32 fault = below(8);
	if (fault == 0) {
		u32 part = below((u32)count);
		parts[part].writable = !parts[part].writable;
	} else if (fault == 1) {
		parts[below((u32)count)].len = odd_len();
	} else if (fault == 2) {
		parts[below((u32)count)].address = odd_address();
	}
	bool indirect = below(4) == 0;
	u64 at = indirect ? table : (u64)&queue->descriptors[first];
	for (int i = 0; i < count; i++) {
		u16 next = (u16)((indirect ? 0 : first) + i + 1);
		u16 flags = (u16)((parts[i].writable ? WRITE : 0) | (i + 1 < count ? NEXT : 0));
		if (fault == 3 && below(2)) {
			flags = (u16)random32();
			next = (u16)random32();
		}
		set_descriptor(at + 16 * (u64)i, parts[i].address, parts[i].len, flags, next);
	}
	if (indirect)
		set_descriptor((u64)&queue->descriptors[first], table, fault == 4 ? odd_len() : 16 * (u32)count,
			       INDIRECT, 0);
}

static u64 chains, returned, restarts;

static void flood_queue(struct device *device, struct queue *queue)
{
	u16 heads = (u16)(queue->size / CHAIN_LEN), used = queue->used[1];
	returned += (u16)(used - queue->seen);
	queue->seen = used;
	for (u32 i = 1 + below(CHAINS_AT_ONCE); i; i--) {
		/* As many as the ring holds, so that only the wrong ones break it. */
		if ((u16)(queue->next - queue->used[1]) >= queue->size)
			break;
		u16 first = (u16)(below(heads) * CHAIN_LEN);
		make_chain(device, queue, first);
		offer(queue, below(2000) ? first : (u16)random32());
		chains++;
	}
	kick(device, queue);
}

static void flood_round(void)
{
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		for (int q = 0; q < device->queue_count; q++)
			flood_queue(device, &device->queues[q]);
		if (below(200) == 0 || needs_reset(device)) {
			restarts++;
			if (!start_with(device, F_INDIRECT | (below(2) ? F_EVENT_IDX : 0)))
				check(false, device->name, "starts again in the flood", 0);
			/* A file server wants to be greeted before it serves. */
			if (device->kind == FS && below(8))
				fuse_init(device);
		}
	}
}

void flood(void)
{
	revive_all("boot");
	struct device *mem = device_of(MEM);
	u32 requested = mem ? get(mem, MEM_REQUESTED) : 0;
	for (u32 round = 0; mem ? get(mem, MEM_REQUESTED) == requested : round < ROUNDS_WITHOUT_END; round++) {
		flood_round();
		if (round == WARM_UP)
			expect(true, "the flood is on");
	}
	put("chains ");
	put_number(chains);
	put(" returned ");
	put_number(returned);
	put(" restarts ");
	put_number(restarts);
	put_char('\n');
	revive_all("the flood");
}

/* Another address, length or direction, or the first words of the request: whatever it is, the device has read it
 * before or will after. */
static void change(struct queue *queue)
{
	struct descriptor *descriptor = &queue->descriptors[below(3)];
	switch (below(5)) {
	case 0:
		descriptor->address = odd_address();
		break;
	case 1:
		descriptor->len = odd_len();
		break;
	case 2:
		descriptor->flags ^= (u16)(1 << below(3));
		break;
	case 3:
		descriptor->next = (u16)below(4);
		break;
	default:
		write64(HEADERS + 8 * below(8), odd_word());
		break;
	}
	compiler_barrier();
}

/* Chains that change while the device has them, one at a time. */
void changing_chains(void)
{
	revive_all("boot");
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		for (int q = 0; q < device->queue_count; q++) {
			struct queue *queue = &device->queues[q];
			for (u32 turn = 0; turn < 60; turn++) {
				/* A queue whose chains wait for something is full some day. */
				if (turn == 0 || needs_reset(device) ||
				    (u16)(queue->next - queue->used[1]) >= queue->size) {
					start_device(device);
					if (device->kind == FS)
						fuse_init(device);
				}
				make_chain(device, queue, 0);
				u16 used = queue->used[1];
				offer(queue, 0);
				kick(device, queue);
				for (u32 step = 0; step < 50 && queue->used[1] == used; step++)
					change(queue);
			}
		}
		witness(device, device->name);
		revive(device, "chains that change");
	}
}
