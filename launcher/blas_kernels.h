// OpenBLAS chooses its kernels when it is loaded, by the processors it knew when it was written. On a newer processor
// it falls back to narrower ones and runs at half speed.
#ifndef TS_BLAS_KERNELS_H
#define TS_BLAS_KERNELS_H

// Where OpenBLAS took AVX2 kernels on a processor that has AVX-512, starts the program anew with OPENBLAS_CORETYPE set
// to the AVX-512 ones. Does nothing when the variable is set already. Call first thing in main, before any library
// starts.
void ts_blas_kernels_choose(char **argv);

#endif
