/* CUDA C++ on a processor: the source of kernels as it goes to NVIDIA's compiler is compiled by the
   host's compiler with this file in the place of the toolkit's headers. It is what checks kernels
   where there is no GPU.

   The blocks of a grid run one after the other. The threads of a block that meet (at barriers and in
   shuffles) are coroutines on one thread of the host, started in ascending order in one block and in
   descending order in the next, so that a result that hangs on the order shows. A barrier that not
   all threads of a block reach, or a shuffle that not all of a warp reach, is told and ends the
   process: on a GPU it would hang or give anything. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static /* blocks run one after the other */
#define CUDART_INF_F INFINITY
#define CUDART_NAN_F NAN
#define CUDART_INF ((double)INFINITY)
#define CUDART_NAN ((double)NAN)

namespace emulated {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;

struct dim3 { int x, y, z; };
enum class At { kReady, kBarrier, kShuffle, kDone };

struct Thread {
  ucontext_t context;
  dim3 index;
  At at;
  long value; /* what it gives to the shuffle that it is in */
  std::vector<char> stack;
};

struct Block {
  std::vector<Thread> threads;
  ucontext_t scheduler;
  int current = 0, count = 0;
  void (*run)(void *) = nullptr;
  void *argument = nullptr;
};

inline Block block;
inline dim3 block_index, block_extent, grid_extent, thread_index;
inline const char *kernel_name = "";

inline void fail(const char *what) {
  fprintf(stderr, "emulated kernel %s: %s\n", kernel_name, what);
  exit(70);
}

inline void wait(At at) {
  Thread &self = block.threads[block.current];
  self.at = at;
  swapcontext(&self.context, &block.scheduler);
}

inline void enter() {
  block.run(block.argument);
  wait(At::kDone);
}

/* Let go all of [from, to) that wait at `at`, if none of them is elsewhere (ended threads count as
   arrived); whether there were any. */
inline bool release(int from, int to, At at) {
  bool found = false;
  for (int i = from; i < to; ++i) {
    At where = block.threads[i].at;
    if (where != at && where != At::kDone) return false;
    found |= where == at;
  }
  for (int i = from; found && i < to; ++i)
    if (block.threads[i].at == at) block.threads[i].at = At::kReady;
  return found;
}

inline void run_together(bool descending) {
  int count = block.count;
  for (int i = 0; i < count; ++i) {
    Thread &thread = block.threads[i];
    thread.at = At::kReady;
    thread.index = {i % block_extent.x, i / block_extent.x % block_extent.y,
                    i / block_extent.x / block_extent.y};
    getcontext(&thread.context);
    thread.stack.resize(kStack);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
  }
  for (;;) {
    bool ran = false;
    for (int n = 0; n < count; ++n) {
      int i = descending ? count - 1 - n : n;
      if (block.threads[i].at != At::kReady) continue;
      block.current = i;
      thread_index = block.threads[i].index;
      swapcontext(&block.scheduler, &block.threads[i].context);
      ran = true;
    }
    if (ran) continue;
    for (int from = 0; from < count; from += kWarp)
      ran |= release(from, std::min(from + kWarp, count), At::kShuffle);
    if (ran || release(0, count, At::kBarrier)) continue;
    for (int i = 0; i < count; ++i)
      if (block.threads[i].at != At::kDone) fail("not all threads reach a barrier or a shuffle");
    return;
  }
}

/* `meets`: threads have barriers or shuffles; others need no stacks of their own. */
inline void launch(const char *name, bool meets, void (*run)(void *), void *argument) {
  kernel_name = name;
  block.count = block_extent.x * block_extent.y * block_extent.z;
  if ((int)block.threads.size() < block.count) block.threads.resize(block.count);
  block.run = run;
  block.argument = argument;
  bool descending = false;
  dim3 &b = block_index, &t = thread_index;
  for (b.z = 0; b.z < grid_extent.z; ++b.z)
    for (b.y = 0; b.y < grid_extent.y; ++b.y)
      for (b.x = 0; b.x < grid_extent.x; ++b.x, descending = !descending) {
        if (meets) {
          run_together(descending);
          continue;
        }
        for (int i = 0; i < block.count; ++i) {
          int n = descending ? block.count - 1 - i : i;
          t = {n % block_extent.x, n / block_extent.x % block_extent.y,
               n / block_extent.x / block_extent.y};
          run(argument);
        }
      }
}

template <typename V>
V shuffle(V value, int source, int width) {
  static_assert(sizeof(V) <= sizeof(long), "a shuffle moves up to 8 bytes");
  int self = block.current, lane = self % kWarp, warp = self - lane;
  memcpy(&block.threads[self].value, &value, sizeof(V));
  wait(At::kShuffle);
  int first = lane / width * width;
  int from = warp + (source < first || source >= first + width ? lane : source);
  if (from >= block.count) from = self;
  V result;
  memcpy(&result, &block.threads[from].value, sizeof(V));
  wait(At::kShuffle); /* nobody gives a next value before all have read this one */
  return result;
}

/* Calls as TVM's generated code makes them (tvm/ffi/c_api.h): pointers and numbers, then extents. */
struct any_t {
  int32_t type_index;
  uint32_t padding;
  union { int64_t v_int64; double v_float64; void *v_ptr; };
};

template <typename P>
P taken(const any_t &given) {
  if constexpr (std::is_pointer_v<P>) return (P)given.v_ptr;
  else if constexpr (std::is_floating_point_v<P>) return (P)given.v_float64;
  else return (P)given.v_int64;
}

template <typename... P, size_t... I>
void start(const char *name, bool meets, void (*kernel)(P...), const any_t *given,
           std::index_sequence<I...>) {
  auto run = [&] { kernel(taken<P>(given[I])...); };
  using Run = decltype(run);
  launch(name, meets, [](void *it) { (*(Run *)it)(); }, &run);
}

template <typename... P>
int call(const char *name, bool meets, void (*kernel)(P...), const any_t *given, int32_t count,
         std::initializer_list<int *> extents) {
  block_extent = grid_extent = {1, 1, 1};
  if (count != (int32_t)(sizeof...(P) + extents.size())) fail("called with other arguments");
  size_t at = sizeof...(P);
  for (int *extent : extents) *extent = (int)given[at++].v_int64;
  start(name, meets, kernel, given, std::make_index_sequence<sizeof...(P)>());
  return 0;
}

}  // namespace emulated

#define EMULATED(KERNEL, MEETS, ...)                                                        \
  extern "C" int __tvm_ffi_##KERNEL(void *, const emulated::any_t *given, int32_t count,    \
                                    emulated::any_t *) {                                    \
    return emulated::call(#KERNEL, MEETS, KERNEL, given, count, {__VA_ARGS__});             \
  }

/* -- what kernels use ------------------------------------------------------------------------ */

#define threadIdx emulated::thread_index
#define blockIdx emulated::block_index
#define blockDim emulated::block_extent
#define gridDim emulated::grid_extent

inline void __syncthreads() { emulated::wait(emulated::At::kBarrier); }
inline void __syncwarp(unsigned = ~0u) { emulated::wait(emulated::At::kShuffle); }
inline unsigned __activemask() { return ~0u; }

template <typename V>
V __shfl_sync(unsigned, V value, int lane, int width = 32) {
  int first = emulated::block.current % emulated::kWarp / width * width;
  return emulated::shuffle(value, first + lane % width, width);
}
template <typename V>
V __shfl_down_sync(unsigned, V value, int by, int width = 32) {
  return emulated::shuffle(value, emulated::block.current % emulated::kWarp + by, width);
}
template <typename V>
V __shfl_up_sync(unsigned, V value, int by, int width = 32) {
  return emulated::shuffle(value, emulated::block.current % emulated::kWarp - by, width);
}
template <typename V>
V __shfl_xor_sync(unsigned, V value, int with, int width = 32) {
  return emulated::shuffle(value, (emulated::block.current % emulated::kWarp) ^ with, width);
}

/* With floats, the number where the other is NaN, as CUDA has it. */
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return fmax((C)a, (C)b);
  else return (C)a < (C)b ? (C)b : (C)a;
}
template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  using C = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<C>) return fmin((C)a, (C)b);
  else return (C)b < (C)a ? (C)b : (C)a;
}
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __int_as_float(int x) { float y; memcpy(&y, &x, 4); return y; }
inline int __float_as_int(float x) { int y; memcpy(&y, &x, 4); return y; }
inline unsigned __float_as_uint(float x) { unsigned y; memcpy(&y, &x, 4); return y; }
template <typename V>
V __ldg(const V *p) { return *p; }

#define EMULATED_VECTORS(NAME, ELEMENT)                                                       \
  struct alignas(2 * sizeof(ELEMENT)) NAME##2 { ELEMENT x, y; };                              \
  struct NAME##3 { ELEMENT x, y, z; };                                                        \
  struct alignas(sizeof(ELEMENT) < 8 ? 4 * sizeof(ELEMENT) : 16) NAME##4 { ELEMENT x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(ELEMENT x, ELEMENT y) { return {x, y}; }                      \
  inline NAME##3 make_##NAME##3(ELEMENT x, ELEMENT y, ELEMENT z) { return {x, y, z}; }        \
  inline NAME##4 make_##NAME##4(ELEMENT x, ELEMENT y, ELEMENT z, ELEMENT w) { return {x, y, z, w}; }
EMULATED_VECTORS(char, signed char)
EMULATED_VECTORS(uchar, unsigned char)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(ushort, unsigned short)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(uint, unsigned int)
EMULATED_VECTORS(longlong, long long)
EMULATED_VECTORS(ulonglong, unsigned long long)
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)

/* Generated code puts it behind __shared__, where only the attribute may stand. */
#define alignas(...) __attribute__((aligned(__VA_ARGS__)))
