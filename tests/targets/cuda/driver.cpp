/* A driver without a GPU, for tests: memory of the device is memory of the host, and kernels are those
   of the library in $EMULATED_KERNELS, by name. It has what TVM's runtime and the probe ask for; built
   twice, as libcuda.so.1 and (with RUNTIME_API) as libcudart.so.13. */
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API extern "C" int
enum { FAILED = 1, MISSING = 500 };

#ifdef RUNTIME_API

static long copies_in, copies_out;

API cudaMalloc(void **at, size_t bytes) { *at = aligned_alloc(256, (bytes + 256) / 256 * 256); return *at ? 0 : 2; }
API cudaFree(void *at) { free(at); return 0; }
API cudaMallocHost(void **at, size_t bytes) { return cudaMalloc(at, bytes); }
API cudaFreeHost(void *at) { free(at); return 0; }
API cudaMemcpyAsync(void *to, const void *from, size_t bytes, int kind, void *) {
  memcpy(to, from, bytes);
  copies_in += kind == 1;
  copies_out += kind == 2;
  return 0;
}
API cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t bytes, void *) { memcpy(to, from, bytes); return 0; }
API cudaGetDevice(int *device) { *device = 0; return 0; }
API cudaSetDevice(int) { return 0; }
API cudaGetDeviceCount(int *count) { *count = 1; return 0; }
API cudaDeviceGetAttribute(int *value, int attribute, int) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
  return 0;
}
API cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = (size_t)1 << 30; return 0; }
API cudaGetLastError() { return 0; }
API cudaPeekAtLastError() { return 0; }
extern "C" const char *cudaGetErrorName(int) { return "error"; }
extern "C" const char *cudaGetErrorString(int) { return "error"; }
API cudaStreamSynchronize(void *) { return 0; }
#define LACKS(NAME) API NAME() { fprintf(stderr, "%s is not there\n", #NAME); return FAILED; }
LACKS(cudaEventCreate) LACKS(cudaEventDestroy) LACKS(cudaEventElapsedTime) LACKS(cudaEventRecord)
LACKS(cudaEventSynchronize) LACKS(cudaGetDeviceProperties) LACKS(cudaGraphDestroy)
LACKS(cudaGraphExecDestroy) LACKS(cudaGraphInstantiate) LACKS(cudaGraphLaunch)
LACKS(cudaStreamBeginCapture) LACKS(cudaStreamCreate) LACKS(cudaStreamCreateWithFlags)
LACKS(cudaStreamDestroy) LACKS(cudaStreamEndCapture) LACKS(cudaStreamWaitEvent)
struct Copies { ~Copies() { fprintf(stderr, "copied in %ld, out %ld\n", copies_in, copies_out); } } told_copies;

#else

typedef void (*kernel_t)(void **parameters, const int *extents);
struct config_t { unsigned grid[3], block[3], shared; void *stream, *attributes; unsigned count; };
static long launches;

API cuInit(unsigned) { return 0; }
API cuDeviceGetCount(int *count) { *count = 1; return 0; }
API cuDeviceGet(int *device, int) { *device = 0; return 0; }
API cuDeviceGetAttribute(int *value, int attribute, int) {
  *value = attribute == 75 ? 9 : 0;
  return 0;
}
API cuDeviceGetName(char *name, int, int) { strcpy(name, "none"); return 0; }
API cuFuncSetAttribute(void *, int, int) { return 0; }
API cuGetErrorName(int, const char **name) { *name = "error"; return 0; }
API cuGetErrorString(int, const char **name) { *name = "error"; return 0; }
API cuModuleLoadData(void **module, const void *code) {
  if (memcmp(code, "\177ELF", 4)) return FAILED; /* a cubin */
  *module = dlopen(getenv("EMULATED_KERNELS"), RTLD_NOW);
  return *module ? 0 : FAILED;
}
API cuModuleGetFunction(void **found, void *module, const char *name) {
  char symbol[512];
  snprintf(symbol, sizeof symbol, "launch_%s", name);
  *found = dlsym(module, symbol);
  return *found ? 0 : MISSING;
}
API cuModuleUnload(void *) { return 0; }
API cuTensorMapEncodeTiled() { return FAILED; }
API cuLaunchKernelEx(const config_t *config, void *kernel, void **parameters, void **) {
  int extents[6];
  for (int i = 0; i < 3; ++i) {
    extents[i] = (int)config->grid[i];
    extents[3 + i] = (int)config->block[i];
  }
  ++launches;
  ((kernel_t)kernel)(parameters, extents);
  return 0;
}
API cuLaunchKernel(void *kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned, void *, void **parameters, void **) {
  config_t config = {{gx, gy, gz}, {bx, by, bz}};
  return cuLaunchKernelEx(&config, kernel, parameters, nullptr);
}
struct Launches { ~Launches() { fprintf(stderr, "launched %ld\n", launches); } } told_launches;

#endif
