/* A program of kernels without an operating system's help beyond files: arguments are the weights'
   file; inputs come on stdin one after the other, outputs go to stdout, until stdin ends. A program
   that keeps tensors from call to call (a cache) reads a byte before the inputs: 1 if what the
   tensors shall hold comes first, 0 if they hold it already; in the beginning they hold zeros.
   A host that shares the program's memory, as a page with a WebAssembly module does, calls the
   functions hal_* instead, and never main: start; fill weights; then, as often as it likes, fill
   inputs, run, read outputs. Inputs share memory with what comes later, so each run needs all.
   program.h, which is generated, has the tables. Layouts are those of TVM's C interface
   (tvm/ffi/c_api.h, tvm/runtime/c_backend_api.h) and of DLPack. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { int32_t type, id; } device_t;
typedef struct { uint8_t code, bits; uint16_t lanes; } dtype_t;
typedef struct {
  void *data;
  device_t device;
  int32_t ndim;
  dtype_t dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} tensor_t;
typedef struct {
  int32_t type_index;
  uint32_t padding;
  union { int64_t v_int64; void *v_ptr; };
} any_t;
typedef int (*kernel_t)(void *, any_t *, int32_t, any_t *);

typedef struct { int where; uint64_t offset, bytes; int32_t ndim; dtype_t dtype; int64_t *shape; } place_t;
typedef struct { kernel_t kernel; const char *name; int count; const int *tensors; } call_t;
enum { ARENA, WEIGHTS };
enum { CPU = 1, TENSOR_POINTER = 7 };

#include "program.h"

#define ALIGNMENT 64

static void fail(const char *what, const char *detail) {
  fprintf(stderr, "%s: %s\n", what, detail);
  exit(1);
}

/* What kernels call. */
void *TVMBackendAllocWorkspace(int kind, int id, uint64_t bytes, int code, int bits) {
  (void)kind, (void)id, (void)code, (void)bits;
  char *all = malloc((size_t)bytes + ALIGNMENT + sizeof(void *));
  if (!all) return 0;
  char *data = (char *)(((uintptr_t)all + sizeof(void *) + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1));
  memcpy(data - sizeof(void *), &all, sizeof all);
  return data;
}
int TVMBackendFreeWorkspace(int kind, int id, void *data) {
  (void)kind, (void)id;
  void *all;
  memcpy(&all, (char *)data - sizeof(void *), sizeof all);
  free(all);
  return 0;
}
typedef struct { void *sync; int32_t tasks; } group_t;
int TVMBackendParallelLaunch(int (*body)(int, group_t *, void *), void *data, int tasks) {
  (void)tasks;
  group_t alone = {0, 1};
  return body(0, &alone, data);
}
int TVMBackendParallelBarrier(int task, group_t *group) { return (void)task, (void)group, 0; }
void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *text) { fprintf(stderr, "%s: %s\n", kind, text); }
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int count) {
  fprintf(stderr, "%s: ", kind);
  for (int i = 0; i < count; i++) fputs(parts[i], stderr);
  fputc('\n', stderr);
}

/* Objects reach them through variables that a loader fills; here, we do. */
#define SLOT(name) extern void *__##name __attribute__((weak))
SLOT(TVMBackendAllocWorkspace);
SLOT(TVMBackendFreeWorkspace);
SLOT(TVMBackendParallelLaunch);
SLOT(TVMBackendParallelBarrier);
SLOT(TVMFFIErrorSetRaisedFromCStr);
SLOT(TVMFFIErrorSetRaisedFromCStrParts);
#define FILL(name) if (&__##name) __##name = (void *)name
static void fill_slots(void) {
  FILL(TVMBackendAllocWorkspace);
  FILL(TVMBackendFreeWorkspace);
  FILL(TVMBackendParallelLaunch);
  FILL(TVMBackendParallelBarrier);
  FILL(TVMFFIErrorSetRaisedFromCStr);
  FILL(TVMFFIErrorSetRaisedFromCStrParts);
}

static char *aligned(uint64_t bytes) {
  char *data = TVMBackendAllocWorkspace(0, 0, bytes ? bytes : 1, 0, 0);
  if (!data) fail("memory", "not enough for the program's tensors");
  return data;
}

static tensor_t tensors[sizeof places / sizeof *places];
static char *base[2];

static int read_all(const int *which, int count) {
  for (int i = 0; i < count; i++) {
    uint64_t bytes = places[which[i]].bytes;
    if (fread(tensors[which[i]].data, 1, bytes, stdin) != bytes) return 0;
  }
  return 1;
}

#ifdef __wasm__
#define CALLED_BY_HOST(name) __attribute__((export_name(#name)))
#else
#define CALLED_BY_HOST(name)
#endif

/* Memory for everything; once, before all others. */
CALLED_BY_HOST(hal_start) void hal_start(void) {
  fill_slots();
  base[ARENA] = aligned(ARENA_BYTES);
  memset(base[ARENA], 0, ARENA_BYTES);
  base[WEIGHTS] = aligned(WEIGHT_BYTES);
  for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
    const place_t *p = &places[i];
    tensors[i] = (tensor_t){base[p->where] + p->offset, {CPU, 0}, p->ndim, p->dtype, p->shape, 0, 0};
  }
}
/* Where WEIGHT_BYTES of weights belong. */
CALLED_BY_HOST(hal_weights) void *hal_weights(void) { return base[WEIGHTS]; }
/* Where the tensor of that number lies, dense and in row-major order. */
CALLED_BY_HOST(hal_input) void *hal_input(int number) { return tensors[inputs[number]].data; }
CALLED_BY_HOST(hal_output) void *hal_output(int number) { return tensors[outputs[number]].data; }
CALLED_BY_HOST(hal_run) void hal_run(void) {
  for (size_t i = 0; i < CALLS; i++) {
    any_t given[MOST_ARGUMENTS], result;
    memset(given, 0, sizeof given), memset(&result, 0, sizeof result);
    for (int k = 0; k < calls[i].count; k++) {
      given[k].type_index = TENSOR_POINTER;
      given[k].v_ptr = &tensors[calls[i].tensors[k]];
    }
    if (calls[i].kernel(0, given, calls[i].count, &result)) fail("kernel failed", calls[i].name);
  }
}

int main(int count, char **arguments) {
  hal_start();
  if (WEIGHT_BYTES) {
    FILE *file = count > 1 ? fopen(arguments[1], "rb") : 0;
    if (!file) fail("weights", count > 1 ? arguments[1] : "no file is given");
    if (fread(hal_weights(), 1, WEIGHT_BYTES, file) != WEIGHT_BYTES) fail("weights", "cut off");
    fclose(file);
  }
  for (;;) {
    int other = KEPT ? getchar() : 0;
    if (other == EOF) return 0;
    if (other && !read_all(kept, KEPT)) return 0;
    if (!read_all(inputs, INPUTS)) return 0;
    hal_run();
    for (int i = 0; i < OUTPUTS; i++) fwrite(hal_output(i), 1, places[outputs[i]].bytes, stdout);
    fflush(stdout);
  }
}
