/*
 * A hostile guest: a kernel that is booted instead of Linux, does to the devices what the command line asks for
 * (`hostile=NAME`), and tells on the serial port how they took it, in lines that begin with `ok` or `bad`; `done` is
 * the last. It ends by a triple fault.
 */
#include "scenarios.h"

/* struct hvm_start_info and hvm_memmap_table_entry, Xen's public/arch-x86/hvm/start_info.h. */
#define CMDLINE_PADDR 24
#define MEMMAP_PADDR 40
#define MEMMAP_ENTRIES 48
#define MEMMAP_ENTRY_SIZE 24

static const struct {
	const char *name;
	void (*run)(void);
} scenarios[] = {
	{"late-writes", late_writes},
	{"resets-in-flight", resets_in_flight},
	{"storm", storm},
	{"impossible-queues", impossible_queues},
	{"nowhere", nowhere},
	{"broken-rings", broken_rings},
	{"bad-chains", bad_chains},
	{"flood", flood},
	{"changing-chains", changing_chains},
	{"block-limits", block_limits},
	{"share-limits", share_limits},
	{"hoard", hoard},
	{"memory-limits", memory_limits},
	{"frames", frames},
	{"vsock-peer", vsock_peer},
	{"chatter", chatter},
};

static bool is_asked_for(const char *line, const char *name)
{
	static const char key[] = "hostile=";
	u64 len = strlen(name);
	for (; *line; line++)
		if (memcmp(line, key, sizeof key - 1) == 0 && memcmp(line + sizeof key - 1, name, len) == 0) {
			char end = line[sizeof key - 1 + len];
			if (end == 0 || end == ' ')
				return true;
		}
	return false;
}

_Noreturn __attribute__((used)) void start(u64 start_info)
{
	static char line[2048];
	memcpy(line, (const void *)read64(start_info + CMDLINE_PADDR), sizeof line - 1);
	/* The memory's last part below the gap; there is none above it. */
	u64 last = read64(start_info + MEMMAP_PADDR) + (read32(start_info + MEMMAP_ENTRIES) - 1u) * MEMMAP_ENTRY_SIZE;
	ram_end = read64(last) + read64(last + 8);
	machine_init();
	find_devices();
	bool known = false;
	for (u64 i = 0; i < ARRAY_SIZE(scenarios); i++)
		if (is_asked_for(line, scenarios[i].name)) {
			known = true;
			scenarios[i].run();
		}
	expect(known, "scenario");
	put("done\n");
	end_guest();
}
