/* See machine.h. */
#include "machine.h"

#define COM1 0x3f8
#define LARGE_PAGE 0x83 /* present, writable, 2 MiB */
#define DIRECTORIES 6
#define EXCEPTIONS 32

u64 ram_end;

u64 top[512] __attribute__((aligned(4096)));
u64 pointers[512] __attribute__((aligned(4096)));
u64 directories[DIRECTORIES][512] __attribute__((aligned(4096)));
static u64 interrupts[2 * EXCEPTIONS] __attribute__((aligned(16)));

/*
 * The PVH entry: 32-bit protected mode without paging, EBX has the start info. Into long mode with the lowest GiB mapped one
 * to one (Intel SDM volume 3A, section 10.8.5); machine_init maps the rest.
 */
asm(".section .note.pvh, \"a\", @note\n"
    ".balign 4\n"
    "    .long 4, 4, 18\n" /* XEN_ELFNOTE_PHYS32_ENTRY */
    "    .asciz \"Xen\"\n"
    "    .long entry\n"
    ".section .text.entry, \"ax\"\n"
    ".code32\n"
    ".globl entry\n"
    "entry:\n"
    "    movl $pointers + 3, top\n"
    "    movl $directories + 3, pointers\n"
    "    movl $0x83, %eax\n" /* LARGE_PAGE */
    "    xorl %ecx, %ecx\n"
    "1:  movl %eax, directories(, %ecx, 8)\n"
    "    addl $0x200000, %eax\n"
    "    incl %ecx\n"
    "    cmpl $512, %ecx\n"
    "    jne 1b\n"
    "    movl $top, %eax\n"
    "    movl %eax, %cr3\n"
    "    movl $0x20, %eax\n" /* CR4.PAE */
    "    movl %eax, %cr4\n"
    "    movl $0xc0000080, %ecx\n" /* IA32_EFER */
    "    rdmsr\n"
    "    orl $0x100, %eax\n" /* LME */
    "    wrmsr\n"
    "    movl %cr0, %eax\n"
    "    orl $0x80000000, %eax\n" /* PG */
    "    movl %eax, %cr0\n"
    "    lgdt segments_pointer\n"
    "    ljmp $8, $long_mode\n"
    ".code64\n"
    "long_mode:\n"
    "    leaq stack_top(%rip), %rsp\n"
    "    xorl %ebp, %ebp\n"
    "    movl %ebx, %edi\n"
    "    call start\n"
    "    ud2\n"
    ".globl exception\n"
    "exception:\n"
    "    movq (%rsp), %rdi\n"
    "    movq 8(%rsp), %rsi\n"
    "    andq $-16, %rsp\n"
    "    call report_exception\n"
    "    ud2\n"
    ".section .data\n"
    ".balign 8\n"
    "segments:\n"
    "    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff\n" /* null, 64-bit code, data */
    "segments_pointer:\n"
    "    .word . - segments - 1\n"
    "    .long segments\n"
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
		/* A gate of the code segment that `entry` has loaded (Intel SDM volume 3A, section 6.14.1). */
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
