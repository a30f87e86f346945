/* Rings and chains that break the rules of section 2.7, one by one, and the device's recovery from each. */
#include "scenarios.h"

/* Queues that a device works on. Receive queues of devices that have nothing to say are looked at when they have. */
struct place {
	enum device_kind kind;
	u32 queue;
	bool needs_stray;
};

static const struct place places[] = {
	{NET, 0, false}, {NET, 1, false},     {BLOCK, 0, false}, {CONSOLE, 1, false},
	{RNG, 0, false}, {BALLOON, 2, false}, {VSOCK, 0, true},  {VSOCK, 1, false},
	{MEM, 0, false}, {FS, 0, false},      {FS, 1, false},
};

/* A packet that the device has to answer, so that it looks at its receive queue. */
static void stray(struct device *device)
{
	static struct vsock_header header;
	header = (struct vsock_header){
		.source = GUEST_CID, .target = HOST_CID, .source_port = 1, .target_port = 2, .type = 1, .op = VSOCK_RW};
	struct part part = {(u64)&header, VSOCK_HEADER, false};
	add(&device->queues[1], &part, 1);
	kick(device, &device->queues[1]);
}

static void ring(struct device *device, const struct place *place)
{
	kick(device, &device->queues[place->queue]);
	if (place->needs_stray)
		stray(device);
}

/* How a ring is broken so that there is no way on. */
static void jump(struct queue *queue, u16 by)
{
	queue->next = (u16)(queue->next + by);
	queue->available[1] = queue->next;
	full_barrier();
}

static void break_ring(struct queue *queue, int how)
{
	/* Not to be written to: a receive queue gives it back at once. */
	struct part part = {scratch, 0x1000, false};
	switch (how) {
	case 0:
		jump(queue, (u16)(queue->size + 1));
		break;
	case 1:
		jump(queue, 0x8000);
		break;
	case 2:
		jump(queue, 0xffff);
		break;
	case 3:
		offer(queue, queue->size);
		break;
	case 4:
		offer(queue, 0xffff);
		break;
	default:
		/* A good chain, then a head that is not there. */
		add(queue, &part, 1);
		offer(queue, (u16)(queue->size + 7));
		break;
	}
}

static const char *const breaks[] = {
	"an index one too far", "an index half way round", "an index that goes back",
	"a head one too large", "the largest head",        "a bad head after a good one",
};

void broken_rings(void)
{
	revive_all("boot");
	for (u64 p = 0; p < ARRAY_SIZE(places); p++) {
		struct device *device = device_of(places[p].kind);
		for (u64 how = 0; device && how < ARRAY_SIZE(breaks); how++) {
			struct queue *queue = &device->queues[places[p].queue];
			if (!start_device(device)) {
				check(false, device->name, "starts before", breaks[how]);
				continue;
			}
			break_ring(queue, (int)how);
			ring(device, &places[p]);
			u32 len;
			enum outcome outcome;
			do
				outcome = wait_outcome(device, queue, &len);
			while (outcome == RETURNED);
			bool asked = check(outcome == BROKEN, device->name, "asks for a reset after", breaks[how]);
			witness(device, device->name);
			/* The wish stays until it is granted. */
			set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
			kick(device, queue);
			if (asked && !needs_reset(device))
				check(false, device->name, "goes on asking after", breaks[how]);
			revive(device, breaks[how]);
		}
	}
}

/* Chains that make no sense, each in a queue that is whole. */
struct chain {
	const char *name;
	struct descriptor descriptors[3];
	struct descriptor table[3];
};

#define TABLE (scratch + 0x100000)
#define BUFFER (scratch + 0x200000)

static int build_chains(struct chain *chains)
{
	struct chain list[] = {
		{"a loop of two", {{BUFFER, 16, NEXT, 1}, {BUFFER, 16, NEXT, 0}}, {}},
		{"a loop of one", {{BUFFER, 16, NEXT | WRITE, 0}}, {}},
		{"a next that is not there", {{BUFFER, 16, NEXT, 0xffff}}, {}},
		{"a table in a table", {{TABLE, 32, INDIRECT, 0}}, {{TABLE, 32, INDIRECT, 0}}},
		{"a table that loops", {{TABLE, 32, INDIRECT, 0}}, {{BUFFER, 16, NEXT, 1}, {BUFFER, 16, NEXT, 0}}},
		{"a table with a next beyond it", {{TABLE, 16, INDIRECT, 0}}, {{BUFFER, 16, NEXT, 1}}},
		{"a table of 17 bytes", {{TABLE, 17, INDIRECT, 0}}, {{BUFFER, 16, 0, 0}}},
		{"a table of no bytes", {{TABLE, 0, INDIRECT, 0}}, {}},
		{"a table of 4 GiB", {{TABLE, 0xfffffff0, INDIRECT, 0}}, {}},
		{"a table beyond memory", {{ram_end + 0x1000, 64, INDIRECT, 0}}, {}},
		{"a table that wraps", {{~0ull - 31, 64, INDIRECT, 0}}, {}},
		{"a table and a next", {{TABLE, 16, INDIRECT | NEXT, 1}, {BUFFER, 16, WRITE, 0}}, {{BUFFER, 16, 0, 0}}},
		{"a table to write to", {{TABLE, 16, INDIRECT | WRITE, 0}}, {{BUFFER, 16, WRITE, 0}}},
		{"a buffer that wraps", {{~0ull - 0xfff, 0x2000, 0, 0}}, {}},
		{"a buffer to write to that wraps", {{~0ull - 0xfff, 0x2000, WRITE, 0}}, {}},
		{"a buffer across the end of memory", {{ram_end - 8, 0x1000, WRITE, 0}}, {}},
		{"a buffer in the gap", {{SLOTS_START, 0x1000, NEXT, 1}, {SLOTS_START, 0x1000, WRITE, 0}}, {}},
		{"a buffer of no bytes", {{BUFFER, 0, 0, 0}}, {}},
		{"buffers of no bytes", {{BUFFER, 0, NEXT, 1}, {BUFFER, 0, WRITE, 0}}, {}},
		{"a buffer of 4 GiB", {{BUFFER, 0xffffffff, WRITE, 0}}, {}},
		{"more than 4 GiB",
		 {{BUFFER, 0xffffffff, NEXT, 1}, {BUFFER, 0xffffffff, NEXT | WRITE, 2}, {BUFFER, 16, WRITE, 0}},
		 {}},
		{"the wrong directions",
		 {{BUFFER, 512, NEXT | WRITE, 1}, {BUFFER, 512, NEXT, 2}, {BUFFER, 1, 0, 0}},
		 {}},
		{"all flags", {{BUFFER, 512, 0xffff, 1}, {BUFFER, 512, 0xffff, 2}, {BUFFER, 512, 0xffff, 0}}, {}},
	};
	memcpy(chains, list, sizeof list);
	return ARRAY_SIZE(list);
}

static void offer_chain(struct queue *queue, const struct chain *chain)
{
	memcpy(queue->descriptors, chain->descriptors, sizeof chain->descriptors);
	memcpy((void *)TABLE, chain->table, sizeof chain->table);
	memset((void *)BUFFER, 0, 0x1000);
	compiler_barrier();
	offer(queue, 0);
}

void bad_chains(void)
{
	static struct chain chains[32];
	int count = build_chains(chains);
	revive_all("boot");
	for (u64 p = 0; p < ARRAY_SIZE(places); p++) {
		struct device *device = device_of(places[p].kind);
		for (int how = 0; device && how < count; how++) {
			struct queue *queue = &device->queues[places[p].queue];
			if (device->kind == NET && places[p].queue == 0 && chains[how].descriptors[0].flags == WRITE)
				continue; /* It may be a good buffer, which waits for a frame. */
			bool good = start_device(device);
			offer_chain(queue, &chains[how]);
			ring(device, &places[p]);
			u32 len = 0;
			enum outcome outcome = wait_outcome(device, queue, &len);
			good = good && outcome != SILENT;
			/* One that was only returned has done no harm: the queue goes on. (vsock answers the stray
			 * first.) */
			if (outcome == RETURNED && !places[p].needs_stray)
				good = honest(device) && good;
			good = start_device(device) && honest(device) && good;
			if (!good)
				check(false, device->name, "survives", chains[how].name);
		}
		if (device) {
			check(true, device->name, "was given every bad chain", 0);
			witness(device, device->name);
		}
	}
}
