#include "kernels/cpu/isa.h"

#define TS_ISA_STRING2(isa) #isa
#define TS_ISA_STRING(isa)  TS_ISA_STRING2(isa)

const ts_ops TS_ISA(ops) = {
    .name = "cpu (" TS_ISA_STRING(TS_CPU_ISA) ")",
    .embed = TS_ISA(embed),
    .rms_norm = TS_ISA(rms_norm),
    .linear = TS_ISA(linear),
    .swiglu = TS_ISA(swiglu),
    .gather_rows = TS_ISA(gather_rows),
    .tile_importance = TS_ISA(tile_importance),
    .tile_prune = TS_ISA(tile_prune),
    .attention = TS_ISA(attention),
    .cross_entropy = TS_ISA(cross_entropy),
};
