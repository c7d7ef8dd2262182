// What the kernels ask of the machine: every instruction that C++ has no word for, and nothing newer
// than compute capability 8.0; without bfloat16 it compiles for Turing (7.5). Stands in front of each
// source file. tests/kernels/emulation/ offers the same names on a CPU.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define RESTRICT __restrict__
#define INLINE __device__ __forceinline__
// Declares `name`, the program's dynamic shared memory.
#define SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]

// Two numbers of 16 bits in a word, the first in the lower half.
enum class Type { half, bf16 };

INLINE u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// -- copies to shared memory that a thread does not wait for ---------------------------------------

// 16 bytes, or zeros if not `inside` (then nothing is read). Turing has no such copies: its threads
// copy, and are done when others would begin.
#if __CUDA_ARCH__ >= 800
INLINE void cp_async(u32 to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}
INLINE void cp_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
// Nothing at all if not `wanted`. A predicate and no branch: copies stand between products, which a
// branch would keep the compiler from moving.
INLINE void cp_async(bool wanted, u32 to, const void* from, bool inside) {
  asm volatile(
      "{\n"
      ".reg .pred wanted;\n"
      "setp.ne.b32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n"
      "}\n" ::"r"(to),
      "l"(from), "r"(inside ? 16 : 0), "r"(static_cast<u32>(wanted))
      : "memory");
}
INLINE void cp_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all but the last N groups of this thread have landed.
template <int N>
INLINE void cp_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
#else
INLINE void cp_async(u32 to, const void* from, bool inside) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (inside) v = *static_cast<const uint4*>(from);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
INLINE void cp_async(u32 to, const void* from) { cp_async(to, from, true); }
INLINE void cp_async(bool wanted, u32 to, const void* from, bool inside) {
  if (wanted) cp_async(to, from, inside);
}
INLINE void cp_commit() {}
template <int N>
INLINE void cp_wait() {}
#endif

// -- shared memory ---------------------------------------------------------------------------------

// Four 8 x 8 matrices of 16-bit numbers; lanes 8 * m to 8 * m + 7 give the rows of matrix m.
INLINE void ldmatrix(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
// The same, each matrix transposed.
INLINE void ldmatrix_transposed(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
INLINE void load_shared(u32 (&r)[4], u32 at) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}
INLINE void load_shared(u32 (&r)[2], u32 at) {
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(at) : "memory");
}
INLINE void store_shared(u32 at, const u32 (&r)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}

// -- tensor cores ----------------------------------------------------------------------------------

// d += a * b, 16 x 8 x 16, sums in float32. a: 16 x 16 as `ldmatrix` of (rows 0-7, 8-15) x (columns
// 0-7, 8-15), first rows then columns; b: 16 x 8, two words of a lane; d: rows lane / 4 and 8 more,
// columns lane % 4 * 2 and the next.
template <Type TYPE>
INLINE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
  static_assert(TYPE == Type::half, "Turing's tensor cores read no bfloat16");
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%8}, "
      "{%0, %1, %2, %3};\n"
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%6, %7}, {%9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  if constexpr (TYPE == Type::half)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
// The same with float16 sums, two in a word.
INLINE void mma_half_sums(u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3}, {%6}, {%0, %1};\n"
      "mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0, %1}, {%4, %5}, {%7}, {%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, "
      "{%0, %1};"
      : "+r"(d[0]), "+r"(d[1])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// -- numbers ---------------------------------------------------------------------------------------

template <Type TYPE>
INLINE u32 pack(float low, float high) {
  u32 word;
#if __CUDA_ARCH__ < 800
  static_assert(TYPE == Type::half, "Turing writes no bfloat16");
  asm("{\n.reg .b16 l, h;\ncvt.rn.f16.f32 l, %1;\ncvt.rn.f16.f32 h, %2;\nmov.b32 %0, {l, h};\n}\n"
      : "=r"(word)
      : "f"(low), "f"(high));
#else
  if constexpr (TYPE == Type::half)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
#endif
  return word;
}
template <Type TYPE>
INLINE void unpack(u32 word, float& low, float& high) {
  if constexpr (TYPE == Type::half) {
    asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}\n"
        : "=f"(low), "=f"(high)
        : "r"(word));
  } else {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000u);
  }
}
// Two sums, or differences, of float16.
INLINE u32 add_halves(u32 a, u32 b) {
  u32 r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
INLINE u32 subtract_halves(u32 a, u32 b) {
  u32 r;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
INLINE float exp2_approx(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
// Of the lane whose number differs in the bits of `mask`; all 32 lanes take part.
INLINE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
INLINE u32 shuffle_xor(u32 x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// -- global memory ---------------------------------------------------------------------------------

// Memory that nobody writes while the kernel runs.
INLINE void load_global(u32 (&r)[4], const void* p) {
  asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "l"(p));
}
INLINE void load_global(u32 (&r)[2], const void* p) {
  asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(p));
}
INLINE void load_global(u32& r, const void* p) {
  asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(r) : "l"(p));
}
INLINE void store_global(void* p, const u32 (&r)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
}
INLINE void store_global(void* p, const u32 (&r)[2]) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(p), "r"(r[0]), "r"(r[1]) : "memory");
}
INLINE void store_global(void* p, u32 r) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(r) : "memory");
}
INLINE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
