/* Registers: out of order, of every width, with values that make no sense. */
#include "scenarios.h"

#define RUNNING (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

static struct device *other(const struct device *victim)
{
	struct device *rng = device_of(RNG);
	return rng && rng != victim ? rng : device_of(CONSOLE);
}

bool witness(const struct device *victim, const char *during)
{
	struct device *device = other(victim);
	return check(device && honest(device), device ? device->name : "nobody", "works beside a broken", during);
}

/* Configuration that is written after DRIVER_OK: nothing of it may have an effect. */
static void write_late(struct device *device)
{
	for (u32 status = 0; status < 256; status++)
		if (status != 0 && !(status & FAILED) && (status & RUNNING) != RUNNING)
			set(device, STATUS, status);
	check(get(device, STATUS) == RUNNING, device->name, "keeps its status bits", 0);
	for (u32 select = 0; select < 4; select++) {
		set(device, DRIVER_FEATURES_SEL, select);
		set(device, DRIVER_FEATURES, ~0u);
	}
	for (u32 index = 0; index < 4; index++) {
		set_queue(device, index, 0, SLOTS_START, ~0ull, 1, 1);
		set_queue(device, index, 0xffffffff, 0, 0, 0, 0);
		set_queue(device, index, 16, scratch, scratch, scratch, 1);
	}
	set(device, QUEUE_SEL, 0);
	check(get(device, QUEUE_READY) == 1, device->name, "keeps its queues", 0);
	for (u32 queue = 0; queue < 70000; queue = queue * 3 + 1)
		set(device, QUEUE_NOTIFY, queue);
	set(device, QUEUE_NOTIFY, 0xffffffff);
	check(get(device, STATUS) == RUNNING && honest(device), device->name, "works after", "late writes");
}

/* FAILED is the driver's last word: after it nothing but a reset does anything. */
static void fail(struct device *device)
{
	set(device, STATUS, RUNNING | FAILED);
	set(device, STATUS, RUNNING);
	check(get(device, STATUS) & FAILED, device->name, "stays failed", 0);
	revive(device, "FAILED");
}

void late_writes(void)
{
	revive_all("boot");
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		if (!revive(device, "witness duty"))
			continue;
		write_late(device);
		fail(device);
		/* Features that were not offered, and none: the device does not agree, and does when asked again. */
		check(!negotiate(device, ~0ull), device->name, "refuses features that are not there", 0);
		reset(device);
		set(device, STATUS, ACKNOWLEDGE | DRIVER);
		set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
		check(get(device, STATUS) == (ACKNOWLEDGE | DRIVER), device->name, "refuses no features", 0);
		/* Steps that are missing. */
		reset(device);
		set(device, STATUS, DRIVER_OK);
		set(device, STATUS, FEATURES_OK | DRIVER_OK);
		check(get(device, STATUS) == 0, device->name, "takes no step before the first", 0);
		revive(device, "a start that was refused");
		witness(device, device->name);
	}
}

/* As many writable and readable buffers as the queue takes. */
static void fill(struct device *device, struct queue *queue, bool writable)
{
	for (u16 i = 0; i < queue->size; i++) {
		struct part part = {scratch + i * 0x1000, 0x1000, writable};
		add_at(queue, i, &part, 1);
	}
	kick(device, queue);
}

void resets_in_flight(void)
{
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		bool started = true, quiet = true;
		for (u32 turn = 0; turn < 24; turn++) {
			started = start_device(device) && started;
			for (int q = 0; q < device->queue_count; q++)
				fill(device, &device->queues[q], turn & 1);
			for (u32 wait = below(2000); wait; wait--)
				pause();
			reset(device);
			/* From here on the rings are the driver's. */
			u16 used[MAX_QUEUES];
			for (int q = 0; q < device->queue_count; q++)
				used[q] = device->queues[q].used[1];
			for (u32 wait = 3000; wait; wait--)
				pause();
			for (int q = 0; q < device->queue_count; q++)
				quiet = quiet && used[q] == device->queues[q].used[1];
		}
		check(started, device->name, "starts again after each reset in flight", 0);
		check(quiet, device->name, "writes nothing after a reset", 0);
		revive(device, "resets in flight");
	}
}

static void access(u64 address, u32 width, bool write, u64 value)
{
	switch (width + (write ? 8 : 0)) {
	case 0:
		read8(address);
		break;
	case 1:
		read16(address);
		break;
	case 2:
		read32(address);
		break;
	case 3:
		read64(address);
		break;
	case 8:
		write8(address, (u8)value);
		break;
	case 9:
		write16(address, (u16)value);
		break;
	case 10:
		write32(address, (u32)value);
		break;
	default:
		write64(address, value);
		break;
	}
}

static u64 odd_value(void)
{
	static const u64 values[] = {0,   1,   2,      3,      15,     16,         64,        127,
				     128, 255, 0x7fff, 0x8000, 0xffff, 0x7fffffff, 0x80000000};
	return below(4) ? values[below(ARRAY_SIZE(values))] : random64();
}

/* Every offset of a slot's registers and the start of its configuration, with every width. */
static void sweep(u64 base, u32 end, u32 step)
{
	for (u32 offset = 0; offset < end; offset += step) {
		for (u32 width = 0; width < 4; width++) {
			access(base + offset, width, false, 0);
			/* A reset would end the state that this is to be done in; resets have their own turn. */
			bool status = offset + (1u << width) > STATUS && offset < STATUS + 4;
			if (!status)
				access(base + offset, width, true, odd_value());
		}
	}
}

static void scatter(u64 base, u32 count)
{
	while (count--)
		access(base + below(below(4) ? 0x120 : SLOT_SIZE - 8), below(4), below(4), odd_value());
}

void storm(void)
{
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		reset(device);
		sweep(device->base, 0x180, 1);
		negotiate(device, F_INDIRECT);
		sweep(device->base, 0x100, 2);
		reset(device);
		start_device(device);
		sweep(device->base, 0x110, 3);
		scatter(device->base, 2000);
		for (u32 offset = SLOT_SIZE - 16; offset < SLOT_SIZE; offset++)
			for (u32 width = 0; width < 4; width++)
				access(device->base + offset, width, offset & 1, ~0ull);
		check(get(device, MAGIC) == 0x74726976 && get(device, DEVICE_ID) == device->kind, device->name,
		      "keeps the registers that are read as memory", 0);
		/* What the storm has left: a queue in use may be anything now, so everything is started afresh. */
		revive(device, "a storm");
	}
	for (u64 slot = (u64)device_count; slot < SLOTS; slot++)
		scatter(SLOT_ADDRESS(slot), 50);
	revive_all("all storms");
}

struct shape {
	const char *name;
	u32 size;
	u64 descriptors, available, used;
};

/* Queues that cannot be: the device has to say so at DRIVER_OK, and to work when it gets ones that can. */
void impossible_queues(void)
{
	u64 a = scratch, b = scratch + 0x10000, c = scratch + 0x20000;
	const struct shape shapes[] = {
		{"a queue of size 0", 0, a, b, c},
		{"a queue of size 3", 3, a, b, c},
		{"a queue of size 65536", 65536, a, b, c},
		{"a queue of size 2^31", 1u << 31, a, b, c},
		{"a queue of size 2^16+8", 65544, a, b, c},
		{"a queue larger than its maximum", 32768, a, b, c},
		{"descriptors in the gap", 8, SLOTS_START, b, c},
		{"an available ring in the gap", 8, a, GAP_START + 0x1000, c},
		{"a used ring over a slot", 8, a, b, SLOTS_START + 0x1000},
		{"descriptors across the end of memory", 8, ram_end - 16, b, c},
		{"a used ring across the end of memory", 8, a, b, ram_end - 8},
		{"an available ring beyond memory", 8, a, ram_end, c},
		{"rings that wrap", 8, ~0ull - 15, ~0ull - 1, ~0ull - 3},
		{"rings at 0", 8, 0, 0, 0},
		{"rings that are not aligned", 8, a + 1, b + 1, c + 1},
		{"rings in one place", 8, a, a, a},
		{"a used ring over the descriptors", 8, a, b, a + 64},
		{"an available ring over the used ring", 8, a, c + 8, c},
	};
	revive_all("boot");
	for (int i = 0; i < device_count; i++) {
		struct device *device = &devices[i];
		for (u64 shape = 0; shape < ARRAY_SIZE(shapes); shape++) {
			const struct shape *s = &shapes[shape];
			bool agreed = negotiate(device, F_INDIRECT);
			for (int q = 0; q < device->queue_count; q++)
				set_queue(device, (u32)q, s->size, s->descriptors, s->available, s->used, 1);
			set(device, STATUS, RUNNING);
			bool refused = needs_reset(device);
			for (int q = 0; q < device->queue_count; q++)
				kick(device, &device->queues[q]);
			if (!agreed || !refused)
				check(false, device->name, "refuses", s->name);
		}
		check(true, device->name, "refuses queues that cannot be", 0);
		/* None of them ready at all. */
		negotiate(device, 0);
		set(device, STATUS, RUNNING);
		check(needs_reset(device), device->name, "refuses to work without queues", 0);
		revive(device, "queues that cannot be");
		/* Two queues in one place are the driver's own trouble: nothing happens to others. */
		negotiate(device, 0);
		for (int q = 0; q < device->queue_count; q++)
			set_queue(device, (u32)q, 8, a, b, c, 1);
		set(device, STATUS, RUNNING);
		for (int q = 0; q < device->queue_count; q++) {
			write32(b, 0x00080000);
			kick(device, &device->queues[q]);
		}
		witness(device, device->name);
		revive(device, "queues in one place");
	}
}

/* Ports and addresses that nobody has read as all ones, and swallow what is written. */
void nowhere(void)
{
	static const u64 addresses[] = {
		GAP_START,
		0xcffffff0,
		SLOTS_START + SLOTS * SLOT_STRIDE,
		SLOTS_START + SLOTS * SLOT_STRIDE + 0xff8,
		0xd0100000,
		0xe0000000,
		0xefff0000,
		0xfed00000,
		0xfebff000,
		HOTPLUG_START + (5ull << 28),
	};
	bool ones = true;
	for (u64 i = 0; i < ARRAY_SIZE(addresses); i++) {
		u64 at = addresses[i];
		for (u32 offset = 0; offset < 5; offset++) {
			for (u32 width = 0; width < 4; width++)
				access(at + offset, width, true, odd_value());
			ones = ones && read8(at + offset) == 0xff && read16(at + offset) == 0xffff &&
			       read32(at + offset) == ~0u && read64(at + offset) == ~0ull;
		}
	}
	expect(ones, "addresses that nobody has read as ones");
	/* Not the controllers and the timer, which are in the kernel, nor the keyboard controller's reset. */
	static const u16 ports[] = {0x0000, 0x0080, 0x00f0, 0x0170, 0x01f0, 0x02f8, 0x0378, 0x03c0, 0x03e8,
				    0x0510, 0x0600, 0x0cf8, 0x0cfc, 0x1000, 0x4444, 0x8000, 0xb000, 0xfffc};
	ones = true;
	for (u64 i = 0; i < ARRAY_SIZE(ports); i++) {
		out8(ports[i], (u8)odd_value());
		out16(ports[i], (u16)odd_value());
		out32(ports[i], (u32)odd_value());
		ones = ones && in8(ports[i]) == 0xff && in16(ports[i]) == 0xffff && in32(ports[i]) == ~0u;
	}
	expect(ones, "ports that nobody has read as ones");
	for (u16 port = 0x60; port <= 0x64; port++) {
		if (port == 0x61)
			continue;
		in8(port);
		in16(port);
		in32(port);
		for (u32 command = 0; command < 0xfe; command++)
			out8(port, (u8)command);
		out16(port, 0xfefe);
		out32(port, 0xfefefefe);
	}
	for (u16 port = 0x3f9; port <= 0x3ff; port++) {
		for (u32 value = 0; value < 256; value += 5)
			out8(port, (u8)value);
		in8(port);
		in16(port);
		in32(port);
	}
	out8(0x3fb, 3);
	out8(0x3fc, 0);
	out8(0x3f9, 0);
	expect(true, "the legacy ports take anything");
	revive_all("probes of nothing");
}
