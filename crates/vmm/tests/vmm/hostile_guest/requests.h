/* Requests as an honest driver makes them: a device that answers one is well. */
#pragma once

#include "virtio.h"

/* An honest request to a device that runs, of its kind, and whether the answer is right. */
bool honest(struct device *device);
/* Reset, start, an honest request; reported. */
bool revive(struct device *device, const char *after);
void revive_all(const char *after);

/* Block (section 5.2.6): one request, its status; 0xff if there was no answer. */
enum block_kind {
	BLOCK_IN = 0,
	BLOCK_OUT = 1,
	BLOCK_FLUSH = 4,
	BLOCK_GET_ID = 8,
	BLOCK_DISCARD = 11,
	BLOCK_ZEROES = 13
};
bool is_read_only(struct device *device);
u8 block_request(struct device *device, u32 kind, u64 sector, u64 address, u32 len);

/* FUSE (Linux include/uapi/linux/fuse.h). */
enum fuse_opcode {
	FUSE_LOOKUP = 1,
	FUSE_FORGET = 2,
	FUSE_GETATTR = 3,
	FUSE_SYMLINK = 6,
	FUSE_MKNOD = 8,
	FUSE_MKDIR = 9,
	FUSE_UNLINK = 10,
	FUSE_RMDIR = 11,
	FUSE_RENAME = 12,
	FUSE_LINK = 13,
	FUSE_OPEN = 14,
	FUSE_READ = 15,
	FUSE_WRITE = 16,
	FUSE_RELEASE = 18,
	FUSE_INIT = 26,
	FUSE_CREATE = 35,
	FUSE_FALLOCATE = 43,
};
#define FUSE_ROOT 1
#define FUSE_IN_HEADER 40
#define FUSE_OUT_HEADER 16
#define FUSE_BODY 4096
/* struct fuse_entry_out: nodeid, generation, times, attributes. */
#define FUSE_ENTRY_LEN 128

extern u8 fuse_reply[FUSE_OUT_HEADER + FUSE_BODY];
/* One request; errno, 0 if it succeeded, -1 if there was no answer. The reply is in fuse_reply. */
int fuse(struct device *device, u32 opcode, u64 node, const void *body, u32 len);
/* The directory of the share that may be written: the root may not. Known after fuse_init. */
extern u64 fuse_volume;
int fuse_init(struct device *device);
/* A request whose body is some bytes and one or two names. */
int fuse_named(struct device *device, u32 opcode, u64 node, const void *body, u32 len, const char *name,
	       const char *more);
u64 fuse_word(u32 offset);

/* virtio-vsock (section 5.10.6). */
enum vsock_op {
	VSOCK_REQUEST = 1,
	VSOCK_RESPONSE = 2,
	VSOCK_RST = 3,
	VSOCK_SHUTDOWN = 4,
	VSOCK_RW = 5,
	VSOCK_CREDIT_UPDATE = 6,
};
struct vsock_header {
	u64 source, target;
	u32 source_port, target_port, len;
	u16 type, op;
	u32 flags, buffer, forwarded;
} __attribute__((packed));
#define VSOCK_HEADER 44
#define HOST_CID 2
#define GUEST_CID 3

/* Sends a packet, whose payload is at `payload`. */
bool vsock_send(struct device *device, const struct vsock_header *header, u64 payload);
/* Waits for a packet, with one buffer on offer. */
bool vsock_receive(struct device *device, struct vsock_header *header, u8 *payload, u32 room);

/* virtio-mem (section 5.15.6): one request, the answer; 0xffff if there was none. */
enum mem_kind { MEM_PLUG = 0, MEM_UNPLUG = 1, MEM_UNPLUG_ALL = 2, MEM_STATE = 3 };
u16 mem_request(struct device *device, u16 kind, u64 address, u16 count);
#define MEM_REQUESTED (CONFIG + 48)
