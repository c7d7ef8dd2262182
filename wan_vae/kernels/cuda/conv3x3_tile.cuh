// What the forms of the 3x3 convolution by mma.sync have in common: tiles, sums, and how they are stored.
// Stands behind machine.cuh and winograd.cuh, in front of conv3x3_mma.cu and conv3x3_mma_2d.cu.
//
// Macros: CIN, COUT (channels of a pixel), FORM, ROWS (of 16 pixels of a tile), BN (output channels of
// a tile), WARPS_M, WARPS_N (warps that share them), KC (input channels of a step), RESIDENT (programs
// that share a multiprocessor), BF16_IN, OUT (0 float16, 1 bfloat16, 2 float32 in planes), HALF_SUMS;
// and for measurements REPEAT: every product so many times, as if the tensor cores were that much
// slower. A warp makes MI rows of 16 pixels by NI * 8 channels.

#define DIRECT 0
#define WINOGRAD 1
#define DOUBLED 2
#define WINOGRAD_2D 3
#define WINOGRAD_4 4
#ifndef REPEAT
#define REPEAT 1
#endif

constexpr Type kIn = BF16_IN ? Type::bf16 : Type::half;
constexpr Type kOut = OUT == 1 ? Type::bf16 : Type::half;
// Frames that a tile makes: of a pair or a quad.
constexpr int kFrames = FORM == WINOGRAD_4 ? 4 : FORM == WINOGRAD || FORM == WINOGRAD_2D ? 2 : 1;
constexpr int kThreads = WARPS_M * WARPS_N * 32;
constexpr int MI = ROWS / WARPS_M, NI = BN / WARPS_N / 8;
constexpr int kVectors = KC / 8;  // 16 bytes each, of a pixel in a halo tile
constexpr int kPixel = KC * 2;
constexpr int kHaloRows = ROWS + 2;
constexpr int kRow = 18 * kPixel;
constexpr int kInput = kHaloRows * kRow;
constexpr int kTap = BN * 32;  // weights of one tap, 16 input channels
constexpr int kChunks = (CIN + KC - 1) / KC;
constexpr int kBlocks = (COUT + BN - 1) / BN;
static_assert(MI * WARPS_M == ROWS && NI * WARPS_N * 8 == BN, "warps share a tile evenly");
static_assert(CIN % 8 == 0 && (COUT % 8 == 0 || OUT == 2), "vectors of eight channels");

#if HALF_SUMS
typedef u32 Sums[MI][NI][2];
#else
typedef float Sums[MI][NI][4];
#endif

struct Tile {
  int block, x, y, group;  // block of channels, first column and row, pair or frame of all clips
  INLINE Tile(int index, int columns, int rows, int groups) {
    block = index % kBlocks;
    index /= kBlocks;
    // The pairs of a clip side by side: the next one reads two of the same frames, then from L2.
    const int side_by_side = kFrames > 1 ? groups : 1, in_clip = index % side_by_side;
    index /= side_by_side;
    x = index % columns * 16;
    index /= columns;
    y = index % rows * ROWS;
    group = index / rows * side_by_side + in_clip;
  }
};

// The first frame of a pair or a quad in its clip. They end with the last frame: those of the first
// one that have a negative number are of the past.
INLINE int first_frame(int group, int frames) {
  return group * kFrames - (-frames & (kFrames - 1));
}

// Where a vector of eight channels stands in its pixel: free of bank conflicts for eight pixels side
// by side, the same in every row.
INLINE int swizzle(int x, int vector) {
  return KC == 16 ? vector ^ ((x >> 2) & 1) : KC == 32 ? vector ^ ((x >> 1) & 3) : vector ^ (x & 7);
}

// Copies halo tiles of (ROWS + 2) x 18 pixels x KC channels. A thread copies one vector of one column,
// of every kAtOnce-th row; what lies outside the picture, or past the last channel, becomes zeros.
struct HaloTiles {
  static constexpr int kPerRow = 18 * kVectors;
  static constexpr int kAtOnce = kThreads / kPerRow;
  static constexpr int kTurns = (kHaloRows + kAtOnce - 1) / kAtOnce;
  static_assert(kAtOnce > 0, "a row of a halo tile has at most one vector for each thread");

  // This thread's.
  int column, vector, row, offset;
  u32 place;
  // The same for all threads. `from`: the tile's corner in the next chunk of channels.
  const char* x;
  int h, w, row_bytes;
  long long frame_bytes;
  const char* from;
  int from_y, from_x, step;

  INLINE HaloTiles(const char* x, int h, int w, u32 base, int tid)
      : x(x), h(h), w(w), from(x), from_y(0), from_x(0), step(0) {
    column = tid % kPerRow / kVectors;
    vector = tid % kVectors;
    row = tid / kPerRow < kAtOnce ? tid / kPerRow : 1 << 20;
    place = base + tid / kPerRow * kRow + column * kPixel + swizzle(column, vector) * 16;
    row_bytes = w * (CIN * 2);
    frame_bytes = static_cast<long long>(h) * row_bytes;
    offset = tid / kPerRow * row_bytes + column * (CIN * 2) + vector * 16;
  }

  // The next chunks are those of a tile whose corner is (`y`, `left`), from `frame` on.
  INLINE void begin(int frame, int y, int left) {
    from_y = y;
    from_x = left;
    from = x + frame * frame_bytes + static_cast<long long>(y) * row_bytes + left * (CIN * 2);
    step = 0;
  }
  INLINE void begin_nothing() { from_y = -(1 << 22); }  // zeros, which nobody reads

  // To the next chunk of channels; behind the last one `frames` on.
  INLINE void next_chunk(int frames) {
    from += step % kChunks ? KC * 2 : frames * frame_bytes - (kChunks - 1) * KC * 2;
  }

  // One turn of a tile that begins `stage` bytes into the ring. Turns that there are not do nothing.
  INLINE void load(int stage, int turn) const {
    const int at = row + turn * kAtOnce;
    const bool on = at < kHaloRows;
    bool inside = on & (static_cast<u32>(from_y + at) < static_cast<u32>(h)) &
                  (static_cast<u32>(from_x + column) < static_cast<u32>(w));
    if (CIN % KC) inside &= step % kChunks * KC + vector * 8 < CIN;
    cp_async(on, place + (stage + turn * (kAtOnce * kRow)),
             from + static_cast<long long>(turn * kAtOnce) * row_bytes + offset, inside);
  }
};

// Copies the weights of a step, kBytes: one step after the other through a block of channels, then
// through the next tile's.
template <int kBytes, u32 kBlockBytes>
struct Weights {
  static constexpr int kTurns = (kBytes + kThreads * 16 - 1) / (kThreads * 16);

  const char* mine;
  u32 place, offset, end, next;

  INLINE Weights(const char* weights, u32 base, int tid)
      : mine(weights + tid * 16), place(base + tid * 16), end(0), next(0) {
    offset = static_cast<u32>(blockIdx.x % kBlocks) * kBlockBytes;
  }
  // During the tile of this index.
  INLINE void begin(int index) {
    end = static_cast<u32>(index % kBlocks + 1) * kBlockBytes;
    next = static_cast<u32>((index + gridDim.x) % kBlocks) * kBlockBytes;
  }
  INLINE void next_step() {
    offset += kBytes;
    if (offset == end) offset = next;
  }
  INLINE void load(int stage, int turn, int tid) const {
    const int i = turn * kThreads * 16;
    const bool on = i + tid * 16 < kBytes;
    if (i + kThreads * 16 <= kBytes) cp_async(place + stage + i, mine + offset + i);
    else cp_async(on, place + stage + i, mine + offset + i, true);
  }
};

INLINE void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  mma<kIn>(d, a, b0, b1);
}
INLINE void multiply(u32 (&d)[2], const u32 (&a)[4], u32 b0, u32 b1) {
  mma_half_sums(d, a, b0, b1);
}

#if HALF_SUMS
INLINE void clear(u32 (&t)[MI][NI][2]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
    for (int n = 0; n < NI; ++n) t[mi][n][0] = t[mi][n][1] = 0;
  }
}

INLINE void add_half_sums(float (&d)[MI][NI][4], const u32 (&t)[MI][NI][2]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
    for (int n = 0; n < NI; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float low, high;
        unpack<Type::half>(t[mi][n][i], low, high);
        d[mi][n][2 * i] += low;
        d[mi][n][2 * i + 1] += high;
      }
    }
  }
}
#endif

INLINE void clear(float (&d)[MI][NI][4]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
    for (int n = 0; n < NI; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) d[mi][n][i] = 0.0f;
    }
  }
}

#if FORM == WINOGRAD_4
INLINE void frames_of_quad(float (&a)[MI][NI][4], float (&b)[MI][NI][4], float (&c)[MI][NI][4],
                           float (&d)[MI][NI][4]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
    for (int n = 0; n < NI; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        frames_of_quad(a[mi][n][i], b[mi][n][i], c[mi][n][i], d[mi][n][i]);
    }
  }
}
#elif FORM == WINOGRAD || FORM == WINOGRAD_2D
INLINE void sums_and_differences(float (&a)[MI][NI][4], float (&b)[MI][NI][4]) {
#pragma unroll
  for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
    for (int n = 0; n < NI; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sum_and_difference(a[mi][n][i], b[mi][n][i]);
    }
  }
}

#endif

#if FORM == WINOGRAD || FORM == WINOGRAD_2D || FORM == WINOGRAD_4
// Brings the residual of a pair's or quad's tile into L2: a thread for each pixel of its frames.
INLINE void prefetch_residual(const void* residual, const Tile& tile, int groups, int frames,
                              int height, int width, int tid) {
  const int clip = tile.group / groups, first = first_frame(tile.group % groups, frames);
  for (int p = tid; p < ROWS * 16 * kFrames; p += kThreads) {
    const int f = first + p / (ROWS * 16);
    const int py = tile.y + p / 16 % ROWS, px = tile.x + p % 16;
    if (f < 0 || py >= height || px >= width) continue;
    const long long pixel = (static_cast<long long>(clip * frames + f) * height + py) * width + px;
    const u16* r = static_cast<const u16*>(residual) + pixel * COUT + tile.block * BN;
    prefetch(r);
    if (BN > 64) prefetch(r + 64);
  }
}
#endif

// Where a warp's part of a tile goes. `pixel`: index of this lane's first pixel in `out`; the others
// are eight columns (`beside`) and rows (`below`) on. `x`, `y`: of the first pixel, in the tile's own
// grid, which is `width` x `height`.
struct Place {
  long long pixel;
  int below, beside;
  int x, y, width, height;
  INLINE bool inside(int p) const { return y + p / 2 < height && x + p % 2 * 8 < width; }
  INLINE long long at(int p) const {
    return pixel + static_cast<long long>(p / 2) * below + p % 2 * beside;
  }
};

#if OUT == 2
// Sums and bias -> float32 planes: `plane` numbers between channels, of which the first is `channel`.
INLINE void store(const float (&d)[MI][NI][4], const Place& to, float* out, long long plane,
                  const float* bias, int channel, int lane) {
#pragma unroll
  for (int p = 0; p < 2 * MI; ++p) {
    if (!to.inside(p)) continue;
#pragma unroll
    for (int n = 0; n < NI; ++n) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int c = channel + n * 8 + lane % 4 * 2 + i;
        if (c < COUT) out[to.at(p) + c * plane] = d[p / 2][n][p % 2 * 2 + i] + bias[c];
      }
    }
  }
}
#else
// The channels of a warp are in such an order that a lane has eight in a row of each 32, then four of
// each 16 that are left, then two of the last eight.
INLINE constexpr int channel_of(int q, int n) {
  return n < NI / 4 * 4        ? n / 4 * 32 + q * 8 + n % 4 * 2
         : n < NI / 2 * 2      ? NI / 4 * 32 + q * 4 + n % 2 * 2
                               : NI / 2 * 16 + q * 2;
}

// Sums, bias and residual -> out, rounded once. `channel`: the warp's first.
INLINE void store(const float (&d)[MI][NI][4], const Place& to, u16* out, const u16* residual,
                  const float* bias, int channel, int lane) {
  const int q = lane % 4;
  constexpr int kFull = NI / 4, kHalf = NI / 2 % 2, kQuarter = NI % 2;
  const auto exists = [&](int c) { return COUT % BN == 0 || channel + c < COUT; };
  // The residual of the next pixel is on its way while one is stored.
  u32 before[2][NI];
  const auto fetch = [&](int p, u32 (&r)[NI]) {
#pragma unroll
    for (int i = 0; i < NI; ++i) r[i] = 0;
    if (!residual || !to.inside(p)) return;
    const u16* from = residual + to.at(p) * COUT + channel;
#pragma unroll
    for (int g = 0; g < kFull; ++g) {
      u32 v[4];
      if (exists(g * 32 + q * 8)) {
        load_global(v, from + g * 32 + q * 8);
#pragma unroll
        for (int i = 0; i < 4; ++i) r[g * 4 + i] = v[i];
      }
    }
    if (kHalf && exists(kFull * 32 + q * 4)) {
      u32 v[2];
      load_global(v, from + kFull * 32 + q * 4);
      r[kHalf ? kFull * 4 : 0] = v[0];
      r[kHalf ? kFull * 4 + 1 : 0] = v[1];
    }
    if (kQuarter && exists(NI / 2 * 16 + q * 2)) load_global(r[NI - 1], from + NI / 2 * 16 + q * 2);
  };
  fetch(0, before[0]);
#pragma unroll
  for (int p = 0; p < 2 * MI; ++p) {
    if (p + 1 < 2 * MI) fetch(p + 1, before[(p + 1) % 2]);
    u32 words[NI];
#pragma unroll
    for (int n = 0; n < NI; ++n) {
      const float* add = bias + channel_of(q, n);
      float r0, r1;
      unpack<kOut>(before[p % 2][n], r0, r1);
      words[n] = pack<kOut>(d[p / 2][n][p % 2 * 2] + (add[0] + r0),
                            d[p / 2][n][p % 2 * 2 + 1] + (add[1] + r1));
    }
    if (!to.inside(p)) continue;
    u16* at = out + to.at(p) * COUT + channel;
#pragma unroll
    for (int g = 0; g < kFull; ++g) {
      const u32 v[4] = {words[g * 4], words[g * 4 + 1], words[g * 4 + 2], words[g * 4 + 3]};
      if (exists(g * 32 + q * 8)) store_global(at + g * 32 + q * 8, v);
    }
    if (kHalf && exists(kFull * 32 + q * 4)) {
      const u32 v[2] = {words[kHalf ? kFull * 4 : 0], words[kHalf ? kFull * 4 + 1 : 0]};
      store_global(at + kFull * 32 + q * 4, v);
    }
    if (kQuarter && exists(NI / 2 * 16 + q * 2)) store_global(at + NI / 2 * 16 + q * 2, words[NI - 1]);
  }
}
#endif
