// One rank's half of a replica: it carries out steps. The leader makes a step and broadcasts it; every rank, the leader
// too, then does the same things in the same order (runtime/job.proto, message Step).
//
//     leader:    while (...) { ts_replica_step(replica, &step, next_tokens); ... }     last a step of kind STOP
//     others:    TS_TRY(ts_replica_follow(replica));                                   returns after STOP
#ifndef TS_REPLICA_H
#define TS_REPLICA_H

#include "runtime/job.pb-c.h"
#include "runtime/model.h"
#include "runtime/sampler.h"

typedef struct ts_replica ts_replica;

typedef struct ts_replica_options {
    int32_t max_sequences;
    int64_t n_pages;       // of the tile cache
    int64_t prefill_chunk; // most rows of a prefill step
    ts_dtype slot_dtype;   // of held tile states (runtime/tile_cache.h)
} ts_replica_options;

// device, tp and model are borrowed until free. Not collective, but all ranks of tp must create alike.
ts_status ts_replica_create(ts_device *device, ts_group *tp, ts_model *model, const ts_replica_options *options,
                            ts_replica **out);
void ts_replica_free(ts_replica *replica);

// The shape of a replica's tile cache on each rank.
ts_tile_cache_shape ts_replica_cache_shape(const ts_device *device, int tp_size, const ts_model *model,
                                           const ts_replica_options *options);

// Bytes of device memory that a replica takes on each rank besides its tile cache, for the memory plan; the scratch of
// ops among them where the device knows it (ts_model_scratch_bytes).
size_t ts_replica_bytes(const ts_device *device, int tp_size, const ts_model *model, const ts_replica_options *options);

// Leader: broadcasts the step and carries it out. next[i] is the token for step->sample_rows[i]. Collective.
ts_status ts_replica_step(ts_replica *replica, Ts__Job__Step *step, ts_next_token *next);

// The other ranks: carries out the leader's steps until STOP. Collective.
ts_status ts_replica_follow(ts_replica *replica);

#endif
