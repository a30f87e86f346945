/*
 * The bare machine: the processor, the serial port, registers in memory, and what the C compiler expects to be there.
 */
#pragma once

#include <stdbool.h>
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;

#define ARRAY_SIZE(array) (sizeof(array) / sizeof((array)[0]))

/* Where virtio-mmio slots are, what comes before and after them, and memory that can be plugged (layout.rs). */
#define GAP_START 0xc0000000ull
#define SLOTS_START 0xd0000000ull
#define SLOT_SIZE 0x1000ull
#define SLOT_STRIDE 0x2000ull
#define SLOT_ADDRESS(slot) (SLOTS_START + (slot) * SLOT_STRIDE + 0x1000 - 0x64)
#define SLOTS 16
#define HOTPLUG_START 0x100000000ull

/* Memory that anything may be written to: the guest's last part, so that what runs over its end meets nothing. */
extern u64 ram_end;
#define SCRATCH_LEN (16ull << 20)
#define scratch (ram_end - SCRATCH_LEN)

void *memset(void *to, int byte, u64 len);
void *memcpy(void *to, const void *from, u64 len);
int memcmp(const void *a, const void *b, u64 len);
u64 strlen(const char *text);

/* Page tables for the first 6 GiB, and an interrupt table that reports exceptions. */
void machine_init(void);
/* A triple fault, which is how a guest of this VMM ends. */
_Noreturn void end_guest(void);

/* The serial port. */
void put_char(char c);
void put(const char *text);
void put_number(u64 number);
/* One line of the report: the verdict and what it is about, of up to three words. */
bool check(bool good, const char *what, const char *which, const char *how);
static inline bool expect(bool good, const char *what)
{
	return check(good, what, 0, 0);
}

/* A generator of numbers that are the same in each run. */
u32 random32(void);
u32 below(u32 limit);
u64 random64(void);

/* Time that only has to be long: about 1 to 4 of these are a nanosecond. */
static inline u64 ticks(void)
{
	u32 low, high;
	asm volatile("rdtsc" : "=a"(low), "=d"(high));
	return (u64)high << 32 | low;
}

static inline void compiler_barrier(void)
{
	asm volatile("" ::: "memory");
}

/* x86 does not reorder stores with stores or loads with loads; this is for a load after a store. */
static inline void full_barrier(void)
{
	asm volatile("lock; addl $0, (%%rsp)" ::: "memory");
}

static inline void pause(void)
{
	asm volatile("pause" ::: "memory");
}

#define ACCESSORS(bits, suffix, constraint)                                                               \
	static inline u##bits read##bits(u64 address)                                                     \
	{                                                                                                 \
		u##bits value;                                                                            \
		asm volatile("mov" suffix " (%1), %0" : "=" constraint(value) : "r"(address) : "memory"); \
		return value;                                                                             \
	}                                                                                                 \
	static inline void write##bits(u64 address, u##bits value)                                        \
	{                                                                                                 \
		asm volatile("mov" suffix " %0, (%1)" : : constraint(value), "r"(address) : "memory");    \
	}
ACCESSORS(8, "b", "q")
ACCESSORS(16, "w", "r")
ACCESSORS(32, "l", "r")
ACCESSORS(64, "q", "r")

#define PORTS(bits, suffix)                                                     \
	static inline u##bits in##bits(u16 port)                                \
	{                                                                       \
		u##bits value;                                                  \
		asm volatile("in" suffix " %1, %0" : "=a"(value) : "d"(port));  \
		return value;                                                   \
	}                                                                       \
	static inline void out##bits(u16 port, u##bits value)                   \
	{                                                                       \
		asm volatile("out" suffix " %0, %1" : : "a"(value), "d"(port)); \
	}
PORTS(8, "b")
PORTS(16, "w")
PORTS(32, "l")
