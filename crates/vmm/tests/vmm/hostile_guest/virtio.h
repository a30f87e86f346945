/*
 * The driver's side of virtio-mmio and split virtqueues (Virtual I/O Device 1.2), by hand: everything can also be done
 * wrongly.
 */
#pragma once

#include "machine.h"

enum register_offset {
	MAGIC = 0x000,
	VERSION = 0x004,
	DEVICE_ID = 0x008,
	DEVICE_FEATURES = 0x010,
	DEVICE_FEATURES_SEL = 0x014,
	DRIVER_FEATURES = 0x020,
	DRIVER_FEATURES_SEL = 0x024,
	QUEUE_SEL = 0x030,
	QUEUE_NUM_MAX = 0x034,
	QUEUE_NUM = 0x038,
	QUEUE_READY = 0x044,
	QUEUE_NOTIFY = 0x050,
	INTERRUPT_ACK = 0x064,
	STATUS = 0x070,
	QUEUE_DESC = 0x080,
	QUEUE_DRIVER = 0x090,
	QUEUE_DEVICE = 0x0a0,
	CONFIG = 0x100,
};

enum status { ACKNOWLEDGE = 1, DRIVER = 2, DRIVER_OK = 4, FEATURES_OK = 8, NEEDS_RESET = 64, FAILED = 128 };

enum device_kind { NET = 1, BLOCK = 2, CONSOLE = 3, RNG = 4, BALLOON = 5, VSOCK = 19, MEM = 24, FS = 26 };

#define F_INDIRECT (1ull << 28)
#define F_EVENT_IDX (1ull << 29)
#define F_VERSION_1 (1ull << 32)

enum descriptor_flag { NEXT = 1, WRITE = 2, INDIRECT = 4 };

struct descriptor {
	u64 address;
	u32 len;
	u16 flags;
	u16 next;
};

/* Queues are made no larger than this, so that each fits its two pages. */
#define MAX_SIZE 128
#define MAX_QUEUES 3

struct queue {
	struct descriptor *descriptors;
	volatile u16 *available; /* flags, index, ring, used_event */
	volatile u16 *used;      /* flags, index, elements of four words */
	u16 index;
	u16 size;
	u16 next; /* what the driver has made available */
	u16 seen; /* what the device has used, as far as the driver has looked */
};

struct device {
	u64 base;
	enum device_kind kind;
	const char *name;
	int queue_count;
	struct queue queues[MAX_QUEUES];
};

/* A buffer of a chain. */
struct part {
	u64 address;
	u32 len;
	bool writable;
};

extern struct device devices[SLOTS];
extern int device_count;

void find_devices(void);
/* The device of a kind; the first if there are several, NULL if there is none. */
struct device *device_of(enum device_kind kind);

static inline u32 get(const struct device *device, u32 offset)
{
	return read32(device->base + offset);
}

static inline void set(const struct device *device, u32 offset, u32 value)
{
	write32(device->base + offset, value);
}

void reset(struct device *device);
/* From reset to FEATURES_OK, with the ring features in `features`; false if the device does not agree. */
bool negotiate(struct device *device, u64 features);
/* Writes a queue's registers. */
void set_queue(struct device *device, u32 index, u32 size, u64 descriptors, u64 available, u64 used, u32 ready);
/* Makes all queues ready, empty, and the device run. */
bool start_with(struct device *device, u64 features);
bool start_device(struct device *device);

bool needs_reset(const struct device *device);

/* Makes a head available without a kick. */
void offer(struct queue *queue, u16 head);
void kick(const struct device *device, const struct queue *queue);
/* Puts a chain into the descriptors from `first` on and offers it. */
void add_at(struct queue *queue, u16 first, const struct part *parts, int count);
void add(struct queue *queue, const struct part *parts, int count);

/* Waits for a used chain, then gives its length. False if none comes, or the device wants a reset. */
bool wait_used(const struct device *device, struct queue *queue, u32 *len);
/* Adds, kicks and waits. */
bool exchange(struct device *device, u32 queue, const struct part *parts, int count, u32 *len);

enum outcome { RETURNED, BROKEN, SILENT };
/* Waits until the device has returned a chain, or wants a reset, or nothing has happened for long. */
enum outcome wait_outcome(const struct device *device, struct queue *queue, u32 *len);
