// Convolution as an implicit GEMM: every kernel size and stride, operands of 16 bits on the tensor
// cores or of float32 on the CUDA cores. For all layers but the 3x3x3 behind a norm and the
// up-samplers, which are worth kernels of their own.
//
// One program: kM pixels of one frame, BN output channels. The sum runs over steps of 64 bytes of a
// pixel, two units of 32 bytes: taps, then channels, whatever the size of the picture. Steps come
// through a ring of kStages stages in shared memory. Weights are packed in the order in which they
// are used (conv.py), zeros where there is no output channel or no unit any more.
//
// CIN: a multiple of 16. COUT: any. KT, KH, KW and ST, SY, SX: the kernel and its steps. IN, OUT:
// 0 float16, 1 bfloat16, 2 float32. WM x WN: warps along pixels and channels. RESIDENT: programs
// that a multiprocessor holds, which bounds the registers.

constexpr int kThreads = WM * WN * 32, kM = 128, kStages = 3;
constexpr int kPixel = CIN * (IN == 2 ? 4 : 2);  // bytes of an input pixel
constexpr int kUnits = kPixel / 32;              // of a tap
constexpr int kTaps = KT * KH * KW;
constexpr bool kLastIsHalf = kTaps * kUnits % 2;
constexpr int kSteps = (kTaps * kUnits + 1) / 2;
constexpr int kBlocks = (COUT + BN - 1) / BN;
constexpr int kA = kM * 64, kB = BN * 64, kStage = kA + kB;
constexpr int kLastStage = (kStages - 1) * kStage, kBiasAt = kStages * kStage;
constexpr int kOut = OUT == 2 ? 4 : 2;  // bytes of a result
#if __CUDA_ARCH__ >= 800
constexpr int kResident = RESIDENT;
#else
constexpr int kResident = 1;  // for which Turing has shared memory
#endif
// The frame is one row, without padding.
constexpr bool kIsRow = KH * KW == 1 && SY == 1 && SX == 1;
static_assert(kPixel % 32 == 0 && KH * KW <= 32, "");

// Where vector `v` of 16 bytes stands in row `row` of 64: no bank conflict for rows side by side.
INLINE int swizzle(int row, int v) { return v ^ (row >> 1 & 3); }

// A thread's way through the taps: it copies one vector of several pixels in every step.
struct Cursor {
  const char* from;  // at the tile's first pixel
  int unit, tap, kx;
  long long next_row, next_frame;

  template <int N>
  INLINE void advance() {
    from += 32 * N;
    unit += N;
    if (unit < kUnits) return;
    unit -= kUnits;  // `from` is at the pixel to the right
    if (KW > 1 && ++kx < KW) {
      ++tap;
      return;
    }
    kx = 0;
    from += next_row;
    if (KH > 1 && ++tap < KH * KW) return;
    tap = 0;
    from += next_frame;
  }
  INLINE void next_step() {
    if constexpr (kUnits > 1) {
      advance<2>();
    } else {
      advance<1>();
      advance<1>();
    }
  }
};

// `N` results of one pixel, rounded once.
template <int N>
INLINE void store(char* to, const float (&v)[N], int channels) {
  constexpr Type kType = OUT == 1 ? Type::bf16 : Type::half;
  if constexpr (COUT % N == 0) {
    if (channels < N) return;
    if constexpr (OUT == 2) {
#pragma unroll
      for (int i = 0; i < N; i += 4) {
        const u32 words[4] = {__float_as_uint(v[i]), __float_as_uint(v[i + 1]),
                              __float_as_uint(v[i + 2]), __float_as_uint(v[i + 3])};
        store_global(to + i * 4, words);
      }
    } else {
      u32 words[N / 2];
#pragma unroll
      for (int i = 0; i < N / 2; ++i) words[i] = pack<kType>(v[2 * i], v[2 * i + 1]);
      store_global(to, words);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i >= channels) return;
      if constexpr (OUT == 2)
        reinterpret_cast<float*>(to)[i] = v[i];
      else
        reinterpret_cast<u16*>(to)[i] = static_cast<u16>(pack<kType>(v[i], 0));
    }
  }
}

INLINE float bias_of(const void* bias, int type, int channel) {
  if (type == 2) return static_cast<const float*>(bias)[channel];
  float value, none;
  const u32 word = static_cast<const u16*>(bias)[channel];
  if (type == 1)
    unpack<Type::bf16>(word, value, none);
  else
    unpack<Type::half>(word, value, none);
  return value;
}

// Where a program's results go: `to` is the place of its first pixel's first channel.
struct Results {
  char* to;
  u32 bias;  // in shared memory
  int pixels, channels;

  template <int N>
  INLINE void read_bias(float (&b)[N], int channel) const {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      u32 words[4];
      load_shared(words, bias + (channel + i) * 4);
#pragma unroll
      for (int k = 0; k < 4; ++k) b[i + k] = __uint_as_float(words[k]);
    }
  }
  template <int N>
  INLINE void store(int pixel, int channel, const float (&v)[N]) const {
    if (pixel < pixels) ::store(to + (pixel * COUT + channel) * kOut, v, channels - channel);
  }
};

// The sums of a thread, one step of them, and where they belong.
#if IN == 2

// 8 pixels, 16 apart, by twice 4 channels, 32 apart.
struct Sums {
  static_assert(BN == 64 && kThreads == 128, "16 x 8 threads");
  float d[8][8];
  int pixel, channel;
  u32 a_at, b_at;
  int a_row;

  INLINE Sums(u32 base, int tid) {
    pixel = tid / 8;
    channel = tid % 8 * 4;
    a_row = pixel;
    a_at = base + pixel * 64;
    b_at = base + kA + tid % 8 * 16;
#pragma unroll
    for (int p = 0; p < 8; ++p) {
#pragma unroll
      for (int c = 0; c < 8; ++c) d[p][c] = 0;
    }
  }
  INLINE void step(u32 stage) {
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      u32 a[8][4];
#pragma unroll
      for (int p = 0; p < 8; ++p)
        load_shared(a[p], a_at + stage + p * 1024 + swizzle(a_row, v) * 16);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        u32 b[2][4];
#pragma unroll
        for (int c = 0; c < 2; ++c) load_shared(b[c], b_at + stage + (v * 4 + k) * 256 + c * 128);
#pragma unroll
        for (int p = 0; p < 8; ++p) {
#pragma unroll
          for (int c = 0; c < 8; ++c)
            d[p][c] =
                __fmaf_rn(__uint_as_float(a[p][k]), __uint_as_float(b[c / 4][c % 4]), d[p][c]);
        }
      }
    }
  }
  INLINE void write(const Results& results) const {
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      float b[4];
      results.read_bias(b, channel + g * 32);
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        float v[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) v[c] = d[p][g * 4 + c] + b[c];
        results.store(pixel + p * 16, channel + g * 32, v);
      }
    }
  }
};

#else

// Fragments: MI x 16 pixels by NI x 8 channels of a warp. The weights are packed so that a lane's
// columns of four tiles, or of the last two, are channels side by side.
struct Sums {
  static constexpr Type kType = IN == 1 ? Type::bf16 : Type::half;
  static constexpr int MI = kM / WM / 16, NI = BN / WN / 8;
  static_assert(NI % 2 == 0 && MI * WM * 16 == kM && NI * WN * 8 == BN, "");
  float d[MI][NI][4];
  int pixel, channel, quad;
  u32 a_at, b_at;

  INLINE Sums(u32 base, int tid) {
    const int lane = tid % 32, wm = tid / 32 / WN, wn = tid / 32 % WN;
    pixel = wm * MI * 16 + lane / 4;
    channel = wn * NI * 8;
    quad = lane % 4;
    a_at = base + (wm * MI * 16 + lane % 16) * 64 + swizzle(lane % 16, lane / 16) * 16;
    b_at = base + kA + wn * (NI / 2 * 512) + lane * 16;
#pragma unroll
    for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
      for (int n = 0; n < NI; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) d[mi][n][i] = 0;
      }
    }
  }
  INLINE void step(u32 stage) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      u32 a[MI][4];
#pragma unroll
      for (int mi = 0; mi < MI; ++mi) ldmatrix(a[mi], ((a_at + stage) ^ (k * 32)) + mi * 1024);
#pragma unroll
      for (int j = 0; j < NI / 2; ++j) {
        u32 b[4];
        load_shared(b, b_at + stage + (k * WN * (NI / 2) + j) * 512);
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
          mma<kType>(d[mi][2 * j], a[mi], b[0], b[1]);
          mma<kType>(d[mi][2 * j + 1], a[mi], b[2], b[3]);
        }
      }
    }
  }
  // Tiles from `FIRST` on, of which a lane has N channels side by side.
  template <int FIRST, int N>
  INLINE void write_group(const Results& results) const {
    const int c = channel + FIRST * 8 + quad * N;
    float b[N];
    results.read_bias(b, c);
#pragma unroll
    for (int mi = 0; mi < MI; ++mi) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float v[N];
#pragma unroll
        for (int i = 0; i < N; ++i) v[i] = d[mi][FIRST + i / 2][h * 2 + i % 2] + b[i];
        results.store(pixel + mi * 16 + h * 8, c, v);
      }
    }
  }
  template <int FIRST = 0>
  INLINE void write(const Results& results) const {
    if constexpr (FIRST + 4 <= NI) {
      write_group<FIRST, 8>(results);
      write<FIRST + 4>(results);
    } else if constexpr (FIRST < NI) {
      write_group<FIRST, 4>(results);
    }
  }
};

#endif

// The place of an output pixel's first tap.
struct Place {
  int y, x;
  INLINE Place(int pixel, int width, int pad_y, int pad_x) {
    y = kIsRow ? 0 : pixel / width * SY - pad_y;
    x = kIsRow ? pixel : pixel % width * SX - pad_x;
  }
};

// x [clips * frames_in, h, w, CIN]; out [clips * frames, height, width, COUT]; bias [COUT] of
// `bias_type` as OUT, or none if negative. pad_y, pad_x: zero rows above and columns on the left;
// what is read beyond the last ones is zero too. first: temporal taps that are left out, 0 or
// KT - 1. One program for each block of channels of each kM pixels of each frame of `out`.
extern "C" __global__ void __launch_bounds__(kThreads, kResident)
conv(const char* RESTRICT x, const char* RESTRICT weights, const void* RESTRICT bias,
     char* RESTRICT out, int bias_type, int frames_in, int frames, int h, int w, int height,
     int width, int pad_y, int pad_x, int first) {
  SHARED_MEMORY(shared);
  const u32 base = shared_address(shared);
  float* bias_shared = reinterpret_cast<float*>(shared + kBiasAt);
  const int tid = threadIdx.x;
  const int pixels = height * width, tiles = (pixels + kM - 1) / kM;
  // Programs that run at the same time read the same pixels: all blocks of a tile, and the same
  // tile of the frames that meet in a result.
  const int block = blockIdx.x % kBlocks, place = blockIdx.x / kBlocks;
  const int frames_out = gridDim.x / kBlocks / tiles;
  const int tile = KT > 1 ? place / frames_out : place % tiles;
  const int frame = KT > 1 ? place % frames_out : place / tiles;
  const int start = tile * kM;

  for (int c = tid; c < BN; c += kThreads) {
    const bool has = bias_type >= 0 && block * BN + c < COUT;
    bias_shared[c] = has ? bias_of(bias, bias_type, block * BN + c) : 0;
  }

  // A thread copies vector tid % 4 of every kThreads / 4-th pixel.
  constexpr int kTurns = kM * 4 / kThreads, kApart = kThreads / 4;
  const int vec = tid % 4, row = tid / 4;
  const Place corner(start, width, pad_y, pad_x);
  int away[kTurns];    // from the tile's first pixel, in vectors
  u32 inside[kTurns];  // a bit for each tap of a frame
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int pixel = start + row + i * kApart;
    const Place at(pixel, width, pad_y, pad_x);
    away[i] = ((at.y - corner.y) * w + at.x - corner.x) * (kPixel / 16);
    inside[i] = 0;
#pragma unroll
    for (int tap = 0; tap < KH * KW; ++tap) {
      const u32 y = at.y + tap / KW, x = at.x + tap % KW;
      const bool in = kIsRow || (y < static_cast<u32>(h) && x < static_cast<u32>(w));
      inside[i] |= static_cast<u32>(in && pixel < pixels) << tap;
    }
  }
  const long long clip = frame / frames, frame_in = clip * frames_in + frame % frames * ST;
  Cursor cursor;
  cursor.from = x + ((frame_in * h + corner.y) * w + corner.x) * kPixel + vec % 2 * 16;
  cursor.unit = cursor.tap = cursor.kx = 0;
  cursor.next_row = static_cast<long long>(w - KW) * kPixel;
  cursor.next_frame = static_cast<long long>(h - KH) * w * kPixel;
  if (vec / 2) cursor.advance<1>();

  const u32 a_to = base + row * 64 + swizzle(row, vec) * 16;
  const u32 b_to = base + kA + tid * 16;
  const int skipped = first * (KH * KW * kUnits) / 2;  // `first` is even
  const char* next_weights =
      weights + (static_cast<long long>(block) * kSteps + skipped) * kB + tid * 16;
  constexpr int kAtOnce = kThreads * 16;
  const auto load = [&](u32 stage, bool is_last) {
    const bool on = !(kLastIsHalf && is_last && vec / 2);
#pragma unroll
    for (int i = 0; i < kTurns; ++i)
      cp_async(a_to + stage + i * (kApart * 64), cursor.from + away[i] * 16ll,
               on && (inside[i] >> cursor.tap & 1));
#pragma unroll
    for (int i = 0; i < kB; i += kAtOnce) {
      if (i + kAtOnce <= kB || i + tid * 16 < kB) cp_async(b_to + stage + i, next_weights + i);
    }
    cursor.next_step();
    next_weights += kB;
  };

  Sums sums(base, tid);
  const int steps = kSteps - skipped;
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) load(s * kStage, s == steps - 1);
    cp_commit();
  }
  u32 stage = 0;
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    cp_wait<kStages - 2>();
    __syncthreads();
    // Into the stage that was read last.
    if (left >= kStages) load(stage ? stage - kStage : kLastStage, left == kStages);
    cp_commit();
    sums.step(stage);
    stage = stage == kLastStage ? 0 : stage + kStage;
  }

  const long long first_pixel = static_cast<long long>(frame) * pixels + start;
  char* to = out + (first_pixel * COUT + block * BN) * kOut;
  sums.write(Results{to, base + kBiasAt, pixels - start, COUT - block * BN});
}
