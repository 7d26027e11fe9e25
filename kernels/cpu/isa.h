// The ops of this backend are compiled once per instruction set, each time with TS_CPU_ISA naming it (baseline, v3,
// v4), which becomes part of every symbol: TS_ISA(linear) is ts_cpu_linear_v4.
#ifndef TS_CPU_ISA_H
#define TS_CPU_ISA_H

#include "kernels/cpu/device.h"

#define TS_ISA_PASTE2(name, isa) ts_cpu_##name##_##isa
#define TS_ISA_PASTE(name, isa)  TS_ISA_PASTE2(name, isa)
#define TS_ISA(name)             TS_ISA_PASTE(name, TS_CPU_ISA)

ts_status TS_ISA(embed)(ts_device *device, const ts_embed_args *args);
ts_status TS_ISA(rms_norm)(ts_device *device, const ts_rms_norm_args *args);
ts_status TS_ISA(linear)(ts_device *device, const ts_linear_args *args);
ts_status TS_ISA(swiglu)(ts_device *device, const ts_swiglu_args *args);
ts_status TS_ISA(gather_rows)(ts_device *device, const ts_gather_rows_args *args);
ts_status TS_ISA(tile_importance)(ts_device *device, const ts_tile_importance_args *args);
ts_status TS_ISA(tile_prune)(ts_device *device, const ts_tile_prune_args *args);
ts_status TS_ISA(attention)(ts_device *device, const ts_attention_args *args);
ts_status TS_ISA(cross_entropy)(ts_device *device, const ts_cross_entropy_args *args);

#endif
