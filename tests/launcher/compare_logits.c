// compare_logits A B: the largest difference of two files of `tessera logits`, over the largest logit of A. Fails above
// 1e-5, which is a few roundings of float32 added up over the layers of the demo model.
#include "runtime/safetensors.h"

#include <math.h>
#include <stdio.h>

int main(int argc, char **argv) {
    const ts_safetensor *logits[2];
    for (int i = 0; i < 2; i++) {
        ts_safetensors *file;
        if (argc != 3 || ts_safetensors_open_file(argv[1 + i], &file) != TS_OK) {
            fprintf(stderr, "compare_logits: %s\n", argc == 3 ? ts_status_message() : "two files are needed");
            return 1;
        }
        logits[i] = ts_safetensors_find(file, "logits");
        if (!logits[i] || logits[i]->dtype != TS_F32 || logits[i]->n_dims != 2) {
            fprintf(stderr, "compare_logits: %s has no F32 matrix \"logits\"\n", argv[1 + i]);
            return 1;
        }
    }
    const ts_safetensor *a = logits[0], *b = logits[1];
    if (a->shape[0] != b->shape[0] || a->shape[1] != b->shape[1]) {
        fprintf(stderr, "compare_logits: the shapes differ\n");
        return 1;
    }
    const float *x = (const float *)(const void *)a->data, *y = (const float *)(const void *)b->data;
    double difference = 0, largest = 0;
    for (int64_t i = 0; i < a->shape[0] * a->shape[1]; i++) {
        if (!isfinite(x[i]) || !isfinite(y[i])) {
            fprintf(stderr, "compare_logits: value %lld is not a finite number\n", (long long)i);
            return 1;
        }
        difference = fmax(difference, fabs((double)x[i] - (double)y[i]));
        largest = fmax(largest, fabs((double)x[i]));
    }
    printf("%s, %s: [%lld, %lld], %.3g of %.3g\n", argv[1], argv[2], (long long)a->shape[0], (long long)a->shape[1],
           difference, largest);
    return difference <= 1e-5 * largest ? 0 : 1;
}
