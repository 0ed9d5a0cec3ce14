/* Numbers of 16 bits: the compiler's own, which rounds after each operation as a GPU does. */
#pragma once
#include "cuda.h"

#define __align__(...) __attribute__((aligned(__VA_ARGS__)))

typedef _Float16 half;
typedef _Float16 __half;
struct __align__(4) half2 { half x, y; };
typedef half2 __half2;

inline half2 make_half2(half x, half y) { return {x, y}; }
inline float __half2float(half x) { return (float)x; }
inline half __float2half(float x) { return (half)x; }
inline half __float2half_rn(float x) { return (half)x; }
inline bool __hgt(half a, half b) { return a > b; }
inline bool __hlt(half a, half b) { return a < b; }

#define EMULATED_HALF(NAME, FUNCTION) \
  inline half NAME(half x) { return (half)FUNCTION((float)x); }
EMULATED_HALF(hexp, expf)
EMULATED_HALF(hexp2, exp2f)
EMULATED_HALF(hexp10, exp10f)
EMULATED_HALF(hlog, logf)
EMULATED_HALF(hlog2, log2f)
EMULATED_HALF(hlog10, log10f)
EMULATED_HALF(hsin, sinf)
EMULATED_HALF(hcos, cosf)
EMULATED_HALF(htan, tanf)
EMULATED_HALF(hatan, atanf)
EMULATED_HALF(htanh, tanhf)
EMULATED_HALF(herf, erff)
EMULATED_HALF(hsqrt, sqrtf)
EMULATED_HALF(hrsqrt, rsqrtf)
EMULATED_HALF(hfloor, floorf)
EMULATED_HALF(hceil, ceilf)
EMULATED_HALF(htrunc, truncf)
EMULATED_HALF(hrint, rintf)
inline half hpow(half x, half y) { return (half)powf((float)x, (float)y); }
inline half __habs(half x) { return x < (half)0 ? -x : x; }
