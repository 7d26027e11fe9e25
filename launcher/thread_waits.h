// How long OpenMP's threads spin at a barrier before they sleep.
#ifndef TS_THREAD_WAITS_H
#define TS_THREAD_WAITS_H

// libgomp spins for milliseconds by default. A step has a hundred barriers, so beside any other busy program each of
// them waits for a thread that has lost its processor, and spins on a processor that the other could use: measured,
// decode fell to a thirtieth. Spinning for some ten microseconds bridges the gap between two ops and gives up
// otherwise. libgomp reads the setting when it is loaded, so this sets GOMP_SPINCOUNT and starts the program anew; it
// does nothing where GOMP_SPINCOUNT or OMP_WAIT_POLICY is set. Call first thing in main.
void ts_thread_waits_shorten(char **argv);

#endif
