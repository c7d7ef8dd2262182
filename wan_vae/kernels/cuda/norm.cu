// RMS norm over channels and SiLU, written as the operand of the convolution behind them: with its
// history frames in front (`norm_join`), or transformed for Winograd along time, F(2,3)
// (`norm_pairs`) or F(4,3) (`norm_quads`). What they compute is said in norm.py. Bound by memory:
// each number is read once.
//
// A pixel belongs to LANES threads of a warp; a thread holds VECTORS times 8 of its channels, 16
// bytes of the result each. The sum of squares runs over the channels of a thread, then over its
// vectors, then over the lanes: in one order, whatever the pixel's place. float32 inside, one
// rounding. With HALO the neighbours' rows (1) or columns (2) are the plane's outermost. They come
// in a launch of their own (`edges`), behind that of the pixels of x, which need not wait for them.
//
// A thread reads the history of its pixels before it writes the new one, which may lie in the same
// memory; no other thread has these pixels.
//
// Compiled at run time with these macros: ENTRY, which of them; CHANNELS, of x; WIDTH, of the result
// (zeros in the rest); X: 0 float16, 1 bfloat16, 2 float32; BF16_OUT: the result is bfloat16, not
// float16; PAST, SILU, HALO; LANES, VECTORS, THREADS.

#define JOIN 0
#define PAIRS 1
#define QUADS 2

typedef long long i64;

constexpr Type kOut = BF16_OUT ? Type::bf16 : Type::half;
constexpr int kXWords = X == 2 ? 8 : 4;  // of 8 channels
static_assert(CHANNELS % 8 == 0 && WIDTH % 8 == 0 && CHANNELS <= WIDTH, "vectors of 8 channels");
static_assert(LANES * VECTORS * 8 >= WIDTH && 32 % LANES == 0 && THREADS % 32 == 0, "");

// What a thread has of a pixel.
struct Features {
  u32 v[VECTORS][kXWords];
};
struct Operand {
  u32 v[VECTORS][4];
};

// One pixel of the plane, in each frame. `lane`: which of its threads this is.
struct Place {
  const char* x;  // null: zeros
  i64 x_step, at, step;  // of a frame; in bytes of x, in channels of the result
  int lane;
  bool inside;

  INLINE Place(const char* own, const char* before, const char* after, int frames, int height,
               int width, bool edges) {
    const int number = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
    const int plane = (height + (HALO == 1 ? 2 : 0)) * (width + (HALO == 2 ? 2 : 0));
    lane = threadIdx.x % LANES;
    step = static_cast<i64>(plane) * WIDTH;
    int pixel = number, from = number, size = height * width;
    const char* base = own;
    inside = number < size;
    if (HALO && edges) {
      size = HALO == 1 ? width : height;
      inside = number < 2 * size;
      const bool is_after = number >= size;
      base = is_after ? after : before;
      from = is_after ? number - size : number;
      if (HALO == 1) pixel = from + (is_after ? (height + 1) * width : 0);
      else pixel = from * (width + 2) + (is_after ? width + 1 : 0);
    } else if (HALO == 1) {
      pixel += width;
    } else if (HALO == 2) {
      pixel += number / width * 2 + 1;
    }
    at = static_cast<i64>(pixel) * WIDTH + lane * 8;
    constexpr i64 kPixel = CHANNELS / 8 * kXWords * 4;
    x_step = size * kPixel;
    x = nullptr;
    if (inside && base)
      x = base + blockIdx.z * frames * x_step + from * kPixel + lane * kXWords * 4;
  }

  // Whether the thread has `channels` of the vector.
  INLINE bool has(int vector, int channels) const {
    return LANES * VECTORS * 8 == channels || (vector * LANES + lane) * 8 < channels;
  }
};

INLINE void load(Features& f, const Place& place, int frame) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
#pragma unroll
    for (int i = 0; i < kXWords; i += 4) {
      u32 r[4] = {0, 0, 0, 0};
      if (place.x && place.has(j, CHANNELS))
        load_global(r, place.x + frame * place.x_step + j * LANES * kXWords * 4 + i * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) f.v[j][i + k] = r[k];
    }
  }
}

// One frame of the history, zeros without one. Not by `load_global`: it may be written.
INLINE void load_past(Operand& o, const Place& place, const u16* history, int frame) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    uint4 r = make_uint4(0, 0, 0, 0);
    if (history && place.inside && place.has(j, WIDTH))
      r = *reinterpret_cast<const uint4*>(history + (blockIdx.z * PAST + frame) * place.step +
                                          place.at + j * LANES * 8);
    o.v[j][0] = r.x, o.v[j][1] = r.y, o.v[j][2] = r.z, o.v[j][3] = r.w;
  }
}

INLINE void store(u16* to, i64 frame, const Place& place, const Operand& o) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j)
    if (place.inside && place.has(j, WIDTH))
      store_global(to + frame * place.step + place.at + j * LANES * 8, o.v[j]);
}

INLINE void widen(float (&v)[8], const u32 (&words)[kXWords]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (X == 2) {
      v[2 * i] = __uint_as_float(words[2 * i]);
      v[2 * i + 1] = __uint_as_float(words[2 * i + 1]);
    } else {
      unpack<X == 1 ? Type::bf16 : Type::half>(words[i], v[2 * i], v[2 * i + 1]);
    }
  }
}

INLINE float activated(float v) {
  if (!SILU) return v;
  constexpr float kLog2E = 1.4426950408889634f;
  return __fdividef(v, 1 + exp2_approx(-kLog2E * v));
}

// All lanes of a warp take part.
INLINE void normalise(Operand& o, const Features& f, const Place& place,
                      const float* RESTRICT scale) {
  float sum = 0;
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    float v[8], squares = 0;
    widen(v, f.v[j]);
#pragma unroll
    for (int i = 0; i < 8; ++i) squares = __fmaf_rn(v[i], v[i], squares);
    sum += squares;
  }
#pragma unroll
  for (int mask = 1; mask < LANES; mask *= 2) sum += shuffle_xor(sum, mask);
  // One over the norm, which is at least 1e-12. NaN stays.
  const float factor = sum < 1e-24f ? 1e12f : rsqrtf(sum);
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    float v[8], gain[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    widen(v, f.v[j]);
    if (place.has(j, CHANNELS)) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        u32 r[4];
        load_global(r, scale + (j * LANES + place.lane) * 8 + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) gain[i + k] = __uint_as_float(r[k]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      o.v[j][i] = pack<kOut>(activated(v[2 * i] * factor * gain[2 * i]),
                             activated(v[2 * i + 1] * factor * gain[2 * i + 1]));
  }
}

#if ENTRY == JOIN
// Grid: (pixels of x or of the edges, frames of x, batch). The threads of the last PAST frames of x write
// the history in front and the new one: frame `slot` of both. A frame that is alone has two slots:
// the old history's last frame is then the new one's first.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_join(const char* RESTRICT x, const char* RESTRICT before, const char* RESTRICT after,
              const float* RESTRICT scale, const u16* history, u16* out, u16* kept, int frames,
              int height, int width, int edges) {
  const Place place(x, before, after, frames, height, width, edges);
  const int frame = blockIdx.y;
  u16* const clip = out + blockIdx.z * (PAST + frames) * place.step;
  Features f;
  Operand o;
  load(f, place, frame);
  const int slot = frame + PAST - frames;
  if (PAST && slot >= 0) {
    load_past(o, place, history, slot);
    store(clip, slot, place, o);
    if (PAST == 2 && frames == 1) {
      Operand first;
      load_past(first, place, history, 0);
      store(clip, 0, place, first);
      if (kept) store(kept, blockIdx.z * PAST, place, o);
    }
  }
  normalise(o, f, place, scale);
  store(clip, PAST + frame, place, o);
  if (PAST && slot >= 0 && kept) store(kept, blockIdx.z * PAST + slot, place, o);
}

#elif ENTRY == PAIRS
template <bool SUBTRACT>
INLINE void store_combined(u16* to, i64 frame, const Place& place, const Operand& a,
                           const Operand& b) {
  Operand o;
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 p = a.v[j][i], q = b.v[j][i];
      if constexpr (kOut == Type::half) {
        o.v[j][i] = SUBTRACT ? subtract_halves(p, q) : add_halves(p, q);
      } else {
        float p0, p1, q0, q1;
        unpack<kOut>(p, p0, p1);
        unpack<kOut>(q, q0, q1);
        o.v[j][i] = SUBTRACT ? pack<kOut>(p0 - q0, p1 - q1) : pack<kOut>(p0 + q0, p1 + q1);
      }
    }
  }
  store(to, frame, place, o);
}

// Grid: (pixels of x or of the edges, 1, batch). A thread goes through all frames of its pixel, with the
// last two in registers.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_pairs(const char* RESTRICT x, const char* RESTRICT before, const char* RESTRICT after,
               const float* RESTRICT scale, const u16* history, u16* out, u16* kept, int frames,
               int height, int width, int edges) {
  const Place place(x, before, after, frames, height, width, edges);
  const int pairs = (frames + 1) / 2;
  i64 to = static_cast<i64>(blockIdx.z) * pairs * 4;
  Operand d0, d1, d2, d3;
  load_past(d0, place, history, 0);
  load_past(d1, place, history, 1);
  for (int frame = -(frames % 2); frame < frames; frame += 2, to += 4) {
    Features f2, f3;
    if (frame >= 0) load(f2, place, frame);
    load(f3, place, frame + 1);
    if (frame >= 0) {
      normalise(d2, f2, place, scale);
    } else {
      // An odd number of frames: the first pair is the last frame of the past and the first new
      // one. The frame before those of the history is not known, and used for none of the new.
      d2 = d1;
      d1 = d0;
      d0 = {};
    }
    normalise(d3, f3, place, scale);
    store_combined<true>(out, to, place, d0, d2);
    store_combined<false>(out, to + 1, place, d1, d2);
    store_combined<true>(out, to + 2, place, d2, d1);
    store_combined<true>(out, to + 3, place, d1, d3);
    d0 = d2;
    d1 = d3;
  }
  if (kept) {
    store(kept, blockIdx.z * 2, place, d0);
    store(kept, blockIdx.z * 2 + 1, place, d1);
  }
}
#elif ENTRY == QUADS
// One frame of the past, of which -1 is the last; zeros where the history does not reach.
INLINE void load_past_frame(Operand& o, const Place& place, const u16* history, int frame) {
  load_past(o, place, frame < -PAST ? nullptr : history, frame + PAST);
}

// Six frames -> the six of the operand, rounded once: B' of winograd.py.
INLINE void store_quad(u16* to, i64 frame, const Place& place, const Operand (&d)[6]) {
#pragma unroll
  for (int j = 0; j < VECTORS; ++j) {
    u32 made[6][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float v[6][2], r[6][2];
#pragma unroll
      for (int k = 0; k < 6; ++k) unpack<kOut>(d[k].v[j][i], v[k][0], v[k][1]);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float even_p = 0.5f * __fmaf_rn(-kFarPointSquared, v[2][k], v[4][k]);
        const float odd_p = __fmaf_rn(-kFarPointSquared, v[1][k], v[3][k]);
        const float even_q = __fmaf_rn(-kPointSquared, v[2][k], v[4][k]);
        const float odd_q = __fmaf_rn(-kPointSquared, v[1][k], v[3][k]);
        r[0][k] = __fmaf_rn(kPoint / 2, odd_p, even_p);
        r[1][k] = __fmaf_rn(-kPoint / 2, odd_p, even_p);
        r[2][k] = __fmaf_rn(kFarPoint, odd_q, even_q);
        r[3][k] = __fmaf_rn(-kFarPoint, odd_q, even_q);
#pragma unroll
        for (int last = 0; last < 2; ++last) {
          const float outer = __fmaf_rn(kPointSquared * kFarPointSquared, v[last][k], v[last + 4][k]);
          r[4 + last][k] = 0.5f * __fmaf_rn(-(kPointSquared + kFarPointSquared), v[last + 2][k], outer);
        }
      }
#pragma unroll
      for (int k = 0; k < 6; ++k) made[k][i] = pack<kOut>(r[k][0], r[k][1]);
    }
    if (!place.inside || !place.has(j, WIDTH)) continue;
#pragma unroll
    for (int k = 0; k < 6; ++k)
      store_global(to + (frame + k) * place.step + place.at + j * LANES * 8, made[k]);
  }
}

// Grid: (pixels of x or of the edges, 1, batch). As `norm_pairs`, four frames at a time. Quads end with the
// last frame: of the first one, some may be of the past. What is not known of them is used for none
// of the new ones, and zero.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_quads(const char* RESTRICT x, const char* RESTRICT before, const char* RESTRICT after,
               const float* RESTRICT scale, const u16* history, u16* out, u16* kept, int frames,
               int height, int width, int edges) {
  const Place place(x, before, after, frames, height, width, edges);
  const int quads = (frames + 3) / 4, first = frames - 4 * quads;
  i64 to = static_cast<i64>(blockIdx.z) * quads * 6;
  Operand d[6];
  load_past_frame(d[0], place, history, first - 2);
  load_past_frame(d[1], place, history, first - 1);
  for (int frame = first; frame < frames; frame += 4, to += 6) {
    Features f[4];
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (frame + k >= 0) load(f[k], place, frame + k);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (frame + k >= 0) normalise(d[2 + k], f[k], place, scale);
      else load_past_frame(d[2 + k], place, history, frame + k);
    }
    store_quad(out, to, place, d);
    d[0] = d[4];
    d[1] = d[5];
  }
  if (kept) {
    store(kept, blockIdx.z * 2, place, d[0]);
    store(kept, blockIdx.z * 2 + 1, place, d[1]);
  }
}
#endif
