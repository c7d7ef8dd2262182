// The names of wan_vae/kernels/cuda/machine.cuh, and those of CUDA's own that the kernels use, for
// a CPU. Stands in front of a kernel's source in the place of machine.cuh; needs __CUDA_ARCH__.

#include "fibers.h"

#define RESTRICT __restrict__
#define INLINE inline
#define SHARED_MEMORY(name) \
  static char* const name = emulation::shared_memory + emulation::kSharedBase

enum class Type { half, bf16 };

// -- CUDA's own ------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(8) uint2 {
  u32 x, y;
};
struct alignas(16) uint4 {
  u32 x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class A, class B>
inline std::common_type_t<A, B> min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
inline std::common_type_t<A, B> max(A a, B b) {
  return a < b ? b : a;
}
extern "C" float fabsf(float), fmaxf(float, float), fminf(float, float), sqrtf(float);

inline float __uint_as_float(u32 v) {
  float f;
  memcpy(&f, &v, 4);
  return f;
}
inline u32 __float_as_uint(float f) {
  u32 v;
  memcpy(&v, &f, 4);
  return v;
}
inline float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

inline void __syncthreads() { emulation::meet(emulation::block, emulation::threads, [] {}); }
inline void __syncwarp() {
  emulation::whole_warp([](int) {});
}

// -- numbers ---------------------------------------------------------------------------------------

namespace emulation {

template <Type TYPE>
inline float wide(u16 v) {
  if constexpr (TYPE == Type::bf16) return __uint_as_float((u32)v << 16);
  _Float16 h;
  memcpy(&h, &v, 2);
  return (float)h;
}
template <Type TYPE>
inline u16 narrow(float f) {
  if constexpr (TYPE == Type::bf16) {
    if (f != f) return 0x7fff;
    const u32 v = __float_as_uint(f);
    return (v + 0x7fff + (v >> 16 & 1)) >> 16;
  }
  const _Float16 h = (_Float16)f;
  u16 v;
  memcpy(&v, &h, 2);
  return v;
}

}  // namespace emulation

template <Type TYPE>
inline u32 pack(float low, float high) {
#if __CUDA_ARCH__ < 800
  static_assert(TYPE == Type::half, "Turing writes no bfloat16");
#endif
  return emulation::narrow<TYPE>(low) | (u32)emulation::narrow<TYPE>(high) << 16;
}
template <Type TYPE>
inline void unpack(u32 word, float& low, float& high) {
  low = emulation::wide<TYPE>(word);
  high = emulation::wide<TYPE>(word >> 16);
}
inline u32 add_halves(u32 a, u32 b) {
  float a0, a1, b0, b1;
  unpack<Type::half>(a, a0, a1);
  unpack<Type::half>(b, b0, b1);
  return pack<Type::half>(a0 + b0, a1 + b1);
}
inline u32 subtract_halves(u32 a, u32 b) { return add_halves(a, b ^ 0x80008000u); }
inline float exp2_approx(float x) {
  const float y = __builtin_exp2f(x);
  return y < 0x1p-126f ? 0 : y;
}
inline u32 shuffle_xor(u32 x, int mask) {
  emulation::Lane& lane = emulation::mine();
  lane.word = x;
  lane.mask = mask;
  emulation::whole_warp([](int first) {
    emulation::Lane* w = emulation::lanes + first;
    for (int l = 0; l < 32; ++l) w[l].result = w[(l ^ w[l].mask) % 32].word;
  });
  return lane.result;
}
inline float shuffle_xor(float x, int mask) {
  return __uint_as_float(shuffle_xor(__float_as_uint(x), mask));
}

// -- copies to shared memory that a thread does not wait for ---------------------------------------

inline u32 shared_address(const void* p) {
  return static_cast<const char*>(p) - emulation::shared_memory;
}
inline void cp_async(u32 to, const void* from, bool inside) {
  char* target = emulation::shared_at(to, 16);
  if (inside) emulation::global_at(from, 16, false);
  emulation::issue(to, inside ? from : nullptr);
#if __CUDA_ARCH__ >= 800
  memset(target, 0xff, 16);  // it may land at any time from now on
#else
  emulation::land(emulation::fibers[threadIdx.x].group);  // Turing's threads copy themselves
#endif
}
inline void cp_async(u32 to, const void* from) { cp_async(to, from, true); }
inline void cp_async(bool wanted, u32 to, const void* from, bool inside) {
  if (wanted) cp_async(to, from, inside);
}
inline void cp_commit() { ++emulation::fibers[threadIdx.x].group; }
template <int N>
inline void cp_wait() {
  emulation::land(emulation::fibers[threadIdx.x].group - 1 - N);
}

// -- shared memory ---------------------------------------------------------------------------------

namespace emulation {

template <bool TRANSPOSED>
inline void load_matrices(u32 (&r)[4], u32 at) {
  shared_at(at, 16);
  mine().at = at;
  mine().words = r;
  whole_warp([](int first) {
    Lane* w = lanes + first;
    for (int m = 0; m < 4; ++m) {
      u16 rows[8][8];
      u32 banks = 0;
      for (int i = 0; i < 8; ++i) {
        banks |= 1u << w[8 * m + i].at / 16 % 8;
        memcpy(rows[i], shared_memory + w[8 * m + i].at, 16);
      }
      conflicts += banks != 0xff;
      for (int l = 0; l < 32; ++l) {
        const int i = l / 4, j = l % 4 * 2;
        w[l].words[m] = TRANSPOSED ? rows[j][i] | (u32)rows[j + 1][i] << 16
                                   : rows[i][j] | (u32)rows[i][j + 1] << 16;
      }
    }
  });
}

}  // namespace emulation

inline void ldmatrix(u32 (&r)[4], u32 at) { emulation::load_matrices<false>(r, at); }
inline void ldmatrix_transposed(u32 (&r)[4], u32 at) { emulation::load_matrices<true>(r, at); }
template <int N>
inline void load_shared(u32 (&r)[N], u32 at) {
  static_assert(N == 2 || N == 4, "no such instruction");
  memcpy(r, emulation::shared_at(at, 4 * N), 4 * N);
}
inline void store_shared(u32 at, const u32 (&r)[4]) {
  memcpy(emulation::shared_at(at, 16), r, 16);
}

// -- tensor cores ----------------------------------------------------------------------------------

namespace emulation {

typedef float Row __attribute__((vector_size(32)));

// The sums of a warp's 16 x 8 x 16 products, in float32 from the first to the last.
template <Type TYPE>
inline void products(const Lane* w, Row (&sums)[16]) {
  float a[16][16];
  alignas(32) float b[16][8];
  for (int l = 0; l < 32; ++l) {
    const int row = l / 4, k = l % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* to = &a[row + i % 2 * 8][k + i / 2 * 8];
      unpack<TYPE>(w[l].a[i], to[0], to[1]);
    }
    for (int i = 0; i < 2; ++i) unpack<TYPE>(w[l].b[i], b[k + i * 8][row], b[k + i * 8 + 1][row]);
  }
  Row columns[16];
  memcpy(columns, b, sizeof b);
  for (int row = 0; row < 16; ++row) {
    Row sum = {};
    for (int k = 0; k < 16; ++k) sum += a[row][k] * columns[k];
    sums[row] = sum;
  }
}

inline Lane& operands(const u32 (&a)[4], u32 b0, u32 b1) {
  Lane& lane = mine();
  memcpy(lane.a, a, 16);
  lane.b[0] = b0;
  lane.b[1] = b1;
  return lane;
}

}  // namespace emulation

template <Type TYPE>
inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
  static_assert(TYPE == Type::half, "Turing's tensor cores read no bfloat16");
#endif
  emulation::operands(a, b0, b1).sums = d;
  emulation::whole_warp([](int first) {
    emulation::Lane* w = emulation::lanes + first;
    emulation::Row sums[16];
    emulation::products<TYPE>(w, sums);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < 4; ++i) w[l].sums[i] += sums[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
  });
}
inline void mma_half_sums(u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  emulation::operands(a, b0, b1).words = d;
  emulation::whole_warp([](int first) {
    emulation::Lane* w = emulation::lanes + first;
    emulation::Row sums[16];
    emulation::products<Type::half>(w, sums);
    for (int l = 0; l < 32; ++l) {
      for (int i = 0; i < 2; ++i) {
        const emulation::Row& row = sums[l / 4 + i * 8];
        float low, high;
        unpack<Type::half>(w[l].words[i], low, high);
        w[l].words[i] = pack<Type::half>(low + row[l % 4 * 2], high + row[l % 4 * 2 + 1]);
      }
    }
  });
}

// -- global memory ---------------------------------------------------------------------------------

template <int N>
inline void load_global(u32 (&r)[N], const void* p) {
  static_assert(N == 2 || N == 4, "no such instruction");
  memcpy(r, emulation::global_at(p, 4 * N, false), 4 * N);
}
inline void load_global(u32& r, const void* p) {
  memcpy(&r, emulation::global_at(p, 4, false), 4);
}
template <int N>
inline void store_global(void* p, const u32 (&r)[N]) {
  static_assert(N == 2 || N == 4, "no such instruction");
  emulation::global_at(p, 4 * N, true);
  memcpy(p, r, 4 * N);
}
inline void store_global(void* p, u32 r) {
  emulation::global_at(p, 4, true);
  memcpy(p, &r, 4);
}
inline void prefetch(const void*) {}
