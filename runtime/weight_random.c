#include "runtime/weight_random.h"

#include <math.h>
#include <string.h>

// What a trained model of this family has (configs/models/demo): gates stand open at 0.73, and a token's decay is such
// that a head forgets within some dozens of tiles.
static const float key_gate_bias = 1.0f, decay_gate_bias = 2.5f, bias_spread = 0.3f;

// The mixer of splitmix64: a bijection in which every bit of the input reaches every bit of the output.
static inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
    return x ^ (x >> 31);
}

static bool ends_with(const char *name, const char *end) {
    const size_t n = strlen(name), n_end = strlen(end);
    return n >= n_end && strcmp(name + n - n_end, end) == 0;
}

ts_weight_tensor ts_weight_random_tensor(uint64_t seed, const char *name, bool is_vector, int64_t rows, int64_t cols) {
    ts_weight_tensor tensor = {TS_BF16, rows, cols, NULL, mix(seed + UINT64_C(0x9e3779b97f4a7c15)), 0, 0};
    for (const char *c = name; *c; c++)
        tensor.key = mix(tensor.key ^ (unsigned char)*c);
    if (!is_vector)
        tensor.spread = 1 / sqrtf((float)cols);
    else if (ends_with(name, "key_gate.bias"))
        tensor.mean = key_gate_bias, tensor.spread = bias_spread;
    else if (ends_with(name, "decay_gate.bias"))
        tensor.mean = decay_gate_bias, tensor.spread = bias_spread;
    else
        tensor.mean = 1;
    return tensor;
}

// The sum of four uniform numbers is near enough to a normal one, and costs one hash: hundreds of millions take
// seconds.
void ts_weight_random_draw(const ts_weight_tensor *tensor, int64_t first, int64_t n, float *out) {
    const float scale = tensor->spread * sqrtf(3) / 65536; // four of variance 65536^2 / 12 each
    for (int64_t i = 0; i < n; i++) {
        const uint64_t bits = mix(tensor->key + (uint64_t)(first + i) * UINT64_C(0x9e3779b97f4a7c15));
        const int32_t sum = (int32_t)((bits & 0xffff) + (bits >> 16 & 0xffff) + (bits >> 32 & 0xffff) + (bits >> 48));
        out[i] = tensor->mean + scale * (float)(sum - 2 * 65535);
    }
}
