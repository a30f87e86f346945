/* See machine.h. */
#include "machine.h"

#define COM1 0x3f8
#define LARGE_PAGE 0x83 /* present, writable, 2 MiB */
#define DIRECTORIES 6
#define EXCEPTIONS 32

u64 ram_end;

static u64 top[512] __attribute__((aligned(4096)));
static u64 pointers[512] __attribute__((aligned(4096)));
static u64 directories[DIRECTORIES][512] __attribute__((aligned(4096)));
static u64 interrupts[2 * EXCEPTIONS] __attribute__((aligned(16)));

/* The 64-bit entry: RSI has the boot parameters. The stack that comes with it is a few hundred bytes from them. */
asm(".section .text.entry, \"ax\"\n"
    ".globl entry\n"
    "entry:\n"
    "    leaq stack_top(%rip), %rsp\n"
    "    xorl %ebp, %ebp\n"
    "    movq %rsi, %rdi\n"
    "    call start\n"
    "    ud2\n"
    ".globl exception\n"
    "exception:\n"
    "    movq (%rsp), %rdi\n"
    "    movq 8(%rsp), %rsi\n"
    "    andq $-16, %rsp\n"
    "    call report_exception\n"
    "    ud2\n"
    ".section .bss\n"
    ".balign 16\n"
    "    .skip 65536\n"
    "stack_top:\n"
    ".text\n");

extern char exception[];

void *memset(void *to, int byte, u64 len)
{
	u8 *at = to;
	while (len--)
		*at++ = (u8)byte;
	return to;
}

void *memcpy(void *to, const void *from, u64 len)
{
	u8 *at = to;
	const u8 *source = from;
	while (len--)
		*at++ = *source++;
	return to;
}

int memcmp(const void *a, const void *b, u64 len)
{
	const u8 *left = a, *right = b;
	for (; len; len--, left++, right++)
		if (*left != *right)
			return *left - *right;
	return 0;
}

u64 strlen(const char *text)
{
	u64 len = 0;
	while (text[len])
		len++;
	return len;
}

static void load_interrupts(u16 limit)
{
	struct {
		u16 limit;
		u64 base;
	} __attribute__((packed)) table = {limit, (u64)interrupts};
	asm volatile("lidt %0" : : "m"(table) : "memory");
}

void machine_init(void)
{
	top[0] = (u64)pointers | 3;
	for (u64 i = 0; i < DIRECTORIES; i++) {
		pointers[i] = (u64)directories[i] | 3;
		for (u64 j = 0; j < 512; j++)
			directories[i][j] = i << 30 | j << 21 | LARGE_PAGE;
	}
	asm volatile("mov %0, %%cr3" : : "r"(top) : "memory");

	u64 at = (u64)exception;
	for (int i = 0; i < EXCEPTIONS; i++) {
		/* A gate of the code segment that the VMM starts with (Intel SDM volume 3A, section 6.14.1). */
		interrupts[2 * i] = (at & 0xffff) | 8 << 16 | 0x8e00ull << 32 | (at >> 16 & 0xffff) << 48;
		interrupts[2 * i + 1] = at >> 32;
	}
	load_interrupts(sizeof interrupts - 1);
}

_Noreturn void end_guest(void)
{
	load_interrupts(0);
	for (;;)
		asm volatile("ud2");
}

_Noreturn __attribute__((used)) void report_exception(u64 first, u64 second)
{
	put("bad exception, stack ");
	put_number(first);
	put_char(' ');
	put_number(second);
	put_char('\n');
	end_guest();
}

void put_char(char c)
{
	out8(COM1, (u8)c);
}

void put(const char *text)
{
	while (*text)
		put_char(*text++);
}

void put_number(u64 number)
{
	char digits[17];
	int at = sizeof digits - 1;
	digits[at] = 0;
	do
		digits[--at] = "0123456789abcdef"[number & 15];
	while (number >>= 4);
	put("0x");
	put(digits + at);
}

bool check(bool good, const char *what, const char *which, const char *how)
{
	const char *words[] = {good ? "ok" : "bad", what, which, how};
	for (u64 i = 0; i < ARRAY_SIZE(words); i++) {
		if (!words[i])
			continue;
		if (i)
			put_char(' ');
		put(words[i]);
	}
	put_char('\n');
	return good;
}

/* xorshift64*, Vigna 2016. */
static u64 state = 0x9e3779b97f4a7c15;

u64 random64(void)
{
	state ^= state >> 12;
	state ^= state << 25;
	state ^= state >> 27;
	return state * 0x2545f4914f6cdd1d;
}

u32 random32(void)
{
	return (u32)(random64() >> 32);
}

u32 below(u32 limit)
{
	return (u32)((u64)random32() * limit >> 32);
}
