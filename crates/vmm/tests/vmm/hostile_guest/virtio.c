/* See virtio.h. */
#include "virtio.h"

/* How long nothing happens before that is the result: tens of seconds, for machines that are slow and overloaded. */
#define LIMIT (60ull << 30)

#define RING_PAGES 0x2000
#define AVAILABLE_AT 0x800
#define USED_AT 0x1000

struct device devices[SLOTS];
int device_count;

static u8 rings[SLOTS][MAX_QUEUES][RING_PAGES] __attribute__((aligned(4096)));

static const char *name_of(u32 kind, int *queues)
{
	switch (kind) {
	case NET:
		*queues = 2;
		return "net";
	case BLOCK:
		*queues = 1;
		return "block";
	case CONSOLE:
		*queues = 2;
		return "console";
	case RNG:
		*queues = 1;
		return "rng";
	case BALLOON:
		*queues = 3;
		return "balloon";
	case VSOCK:
		*queues = 3;
		return "vsock";
	case MEM:
		*queues = 1;
		return "mem";
	case FS:
		*queues = 2;
		return "fs";
	default:
		*queues = 0;
		return 0;
	}
}

void find_devices(void)
{
	for (u64 slot = 0; slot < SLOTS; slot++) {
		struct device *device = &devices[device_count];
		device->base = SLOT_ADDRESS(slot);
		u32 kind = get(device, DEVICE_ID);
		device->kind = kind;
		device->name = name_of(kind, &device->queue_count);
		if (get(device, MAGIC) != 0x74726976 || get(device, VERSION) != 2)
			expect(false, "magic of a slot");
		if (!device->name)
			continue;
		for (int i = 0; i < device->queue_count; i++) {
			u8 *ring = rings[slot][i];
			device->queues[i].descriptors = (struct descriptor *)ring;
			device->queues[i].available = (u16 *)(ring + AVAILABLE_AT);
			device->queues[i].used = (u16 *)(ring + USED_AT);
			device->queues[i].index = (u16)i;
		}
		device_count++;
	}
}

struct device *device_of(enum device_kind kind)
{
	for (int i = 0; i < device_count; i++)
		if (devices[i].kind == kind)
			return &devices[i];
	return 0;
}

void reset(struct device *device)
{
	set(device, STATUS, 0);
}

bool negotiate(struct device *device, u64 features)
{
	reset(device);
	/* Not over before the status is 0 (section 2.4.1): a request may be in the host still. */
	for (u64 begin = ticks(); get(device, STATUS) != 0;)
		if (ticks() - begin > LIMIT)
			return false;
	set(device, STATUS, ACKNOWLEDGE);
	set(device, STATUS, ACKNOWLEDGE | DRIVER);
	features |= F_VERSION_1;
	set(device, DRIVER_FEATURES_SEL, 0);
	set(device, DRIVER_FEATURES, (u32)features);
	set(device, DRIVER_FEATURES_SEL, 1);
	set(device, DRIVER_FEATURES, (u32)(features >> 32));
	set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
	return get(device, STATUS) == (ACKNOWLEDGE | DRIVER | FEATURES_OK);
}

static void set_address(struct device *device, u32 offset, u64 address)
{
	set(device, offset, (u32)address);
	set(device, offset + 4, (u32)(address >> 32));
}

void set_queue(struct device *device, u32 index, u32 size, u64 descriptors, u64 available, u64 used, u32 ready)
{
	set(device, QUEUE_SEL, index);
	set(device, QUEUE_NUM, size);
	set_address(device, QUEUE_DESC, descriptors);
	set_address(device, QUEUE_DRIVER, available);
	set_address(device, QUEUE_DEVICE, used);
	set(device, QUEUE_READY, ready);
}

bool start_with(struct device *device, u64 features)
{
	if (!negotiate(device, features))
		return false;
	for (int i = 0; i < device->queue_count; i++) {
		struct queue *queue = &device->queues[i];
		set(device, QUEUE_SEL, (u32)i);
		u32 max = get(device, QUEUE_NUM_MAX);
		queue->size = (u16)(max < MAX_SIZE ? max : MAX_SIZE);
		queue->next = 0;
		queue->seen = 0;
		queue->available[0] = queue->available[1] = 0;
		queue->used[0] = queue->used[1] = 0;
		set_queue(device, (u32)i, queue->size, (u64)queue->descriptors, (u64)queue->available, (u64)queue->used,
			  1);
	}
	set(device, STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
	return get(device, STATUS) == (ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

bool start_device(struct device *device)
{
	return start_with(device, F_INDIRECT);
}

bool needs_reset(const struct device *device)
{
	return get(device, STATUS) & NEEDS_RESET;
}

void offer(struct queue *queue, u16 head)
{
	queue->available[2 + queue->next % queue->size] = head;
	compiler_barrier();
	queue->available[1] = ++queue->next;
	full_barrier();
}

void kick(const struct device *device, const struct queue *queue)
{
	set(device, QUEUE_NOTIFY, queue->index);
}

void add_at(struct queue *queue, u16 first, const struct part *parts, int count)
{
	for (int i = 0; i < count; i++) {
		struct descriptor *descriptor = &queue->descriptors[first + i];
		descriptor->address = parts[i].address;
		descriptor->len = parts[i].len;
		descriptor->flags = (u16)((parts[i].writable ? WRITE : 0) | (i + 1 < count ? NEXT : 0));
		descriptor->next = (u16)(first + i + 1);
	}
	compiler_barrier();
	offer(queue, first);
}

void add(struct queue *queue, const struct part *parts, int count)
{
	add_at(queue, 0, parts, count);
}

enum outcome wait_outcome(const struct device *device, struct queue *queue, u32 *len)
{
	u64 start = ticks();
	/* The register is looked at now and then: each look is an exit. */
	for (u32 turn = 0;; turn++) {
		if (queue->used[1] != queue->seen) {
			volatile u16 *element = &queue->used[2 + 4 * (queue->seen % queue->size)];
			*len = (u32)element[2] | (u32)element[3] << 16;
			queue->seen++;
			return RETURNED;
		}
		if (turn % 1024 == 1023) {
			if (needs_reset(device))
				return BROKEN;
			if (ticks() - start > LIMIT)
				return SILENT;
		}
		pause();
	}
}

bool wait_used(const struct device *device, struct queue *queue, u32 *len)
{
	return wait_outcome(device, queue, len) == RETURNED;
}

bool exchange(struct device *device, u32 index, const struct part *parts, int count, u32 *len)
{
	struct queue *queue = &device->queues[index];
	add(queue, parts, count);
	kick(device, queue);
	return wait_used(device, queue, len);
}
