/* What this guest can do; main.c has the names. */
#pragma once

#include "requests.h"

/* registers.c */
void late_writes(void);
void resets_in_flight(void);
void storm(void);
void impossible_queues(void);
void nowhere(void);
/* broken.c */
void broken_rings(void);
void bad_chains(void);
/* flood.c */
void flood(void);
void changing_chains(void);
/* devices.c */
void block_limits(void);
void share_limits(void);
void hoard(void);
void memory_limits(void);
void frames(void);
void vsock_peer(void);
void chatter(void);

/* Reports that a device which is not `victim` answers. */
bool witness(const struct device *victim, const char *during);
