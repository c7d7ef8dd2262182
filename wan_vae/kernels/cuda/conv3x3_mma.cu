// 3x3 convolution over frames for every NVIDIA card from Ampere on (Turing too, in float16): tensor
// cores by mma.sync, halo tiles by cp.async, at most 99 KiB of shared memory.
//
// One tile: ROWS x 16 output pixels, BN output channels. FORM says what the accumulators are:
//   DIRECT:   one output frame, KT input frames, one accumulator.
//   WINOGRAD: the two output frames of a pair, Winograd F(2,3) along time. The input holds four
//             transformed frames a pair; A gathers m1, B m2, then (A, B) = (A + B, A - B), then m0
//             is added to A and m3 (its weights negated) to B.
//             Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015).
//   WINOGRAD_4: the four output frames of a quad, Winograd F(4,3) along time. The input holds six
//             transformed frames a quad, in the order of their use: the products of the first four go
//             to A, B, C and D, which become the four frames, then those of the last two are added
//             to A and D. See winograd.py.
//   DOUBLED:  the input is doubled in height and width first. That folds the 3 x 3 taps to 2 x 2,
//             others for each parity of the output's row and column: ROWS x 16 input pixels make
//             twice as many each way, the even rows and then the odd ones; A and B are the even and
//             the odd columns.
// A halo tile of (ROWS + 2) x 18 pixels x KC channels stands in shared memory (a ring of two) for all
// taps. Weights come step by step, in the order of the tensor cores' fragments: a step is a column
// of taps. A warp makes MI rows of 16 pixels by NI * 8 channels; its fragments of MI + 2 rows of
// pixels serve all taps of a column.
//
// The sum of an output pixel runs over (phase, KC channels, columns of taps, 16 channels, rows of
// taps) whatever its place in tile and picture: its bits depend on nothing but its inputs.
// HALF_SUMS: the products of KC channels (9 * KC of them) are summed in float16, then added in
// float32. On GeForce the tensor cores are twice as fast with float16 sums.
//
// Macros: see conv3x3_tile.cuh, and KT.

constexpr int kSteps = FORM == DOUBLED ? 4 : 3;  // of KC channels: columns of taps
constexpr int kTaps = FORM == DOUBLED ? 2 : 3;   // of a step
constexpr int kWeights = KC / 16 * kTaps * kTap; // of a step
constexpr int kPhases = FORM == WINOGRAD_4 ? 6 : FORM == WINOGRAD ? 4 : FORM == DOUBLED ? 2 : KT;
constexpr int kWeightsAt = 2 * kInput;  // a stage of the ring for each step
constexpr int kBiasAt = kWeightsAt + kSteps * kWeights;
constexpr int kSharedBytes = kBiasAt + kBlocks * BN * 4;
static_assert(kSharedBytes <= 101376, "99 KiB");

// One step: d += a column of taps, KC channels. `pixels`: this lane's address in the first row of the
// first tap; `weights`: of this warp's. `between(tap)` runs within each tap.
template <class Between>
INLINE void products(Sums& d, u32 pixels, u32 weights, int lane, Between between) {
#pragma unroll
  for (int k = 0; k < KC / 16; ++k) {
    u32 a[MI + kTaps - 1][4];
#pragma unroll
    for (int row = 0; row < MI; ++row) ldmatrix(a[row], (pixels ^ (k * 32)) + row * kRow);
#pragma unroll
    for (int tap = 0; tap < kTaps; ++tap) {
      if (tap) ldmatrix(a[MI + tap - 1], (pixels ^ (k * 32)) + (MI + tap - 1) * kRow);
      const u32 from = weights + (k * kTaps + tap) * kTap;
#pragma unroll
      for (int j = 0; j < (NI + 1) / 2; ++j) {
        u32 b[4];
        if (2 * j + 1 < NI) {
          load_shared(b, from + j * 512 + lane * 16);
        } else {
          u32 last[2];
          load_shared(last, from + j * 512 + lane * 8);
          b[0] = last[0], b[1] = last[1];
        }
#pragma unroll
        for (int repeat = 0; repeat < REPEAT; ++repeat) {
#pragma unroll
          for (int mi = 0; mi < MI; ++mi) {
            multiply(d[mi][2 * j], a[mi + tap], b[0], b[1]);
            if (2 * j + 1 < NI) multiply(d[mi][2 * j + 1 < NI ? 2 * j + 1 : 0], a[mi + tap], b[2], b[3]);
          }
        }
        if (j == 0) between(k * kTaps + tap);
      }
    }
  }
}

// x: [frames, h, w, CIN]. weights: packed, see conv3x3_mma.py. out and residual: [clips * frames,
// height, width, COUT]; OUT 2: [clips, COUT, frames, height, width]; DOUBLED: [frames, 2 * height,
// 2 * width, COUT]. A group is a pair (WINOGRAD), a quad or a frame: `groups` of them in each clip, whose
// input begins `group_stride` frames after each other and `batch_stride` a clip.
extern "C" __global__ void __launch_bounds__(kThreads, RESIDENT)
conv3x3(const char* RESTRICT x, const char* RESTRICT weights, const float* RESTRICT bias,
        const void* RESTRICT residual, void* RESTRICT out, int frames, int h, int w, int height,
        int width, int groups, int group_stride, int batch_stride, int pad_y, int pad_x, int tiles) {
  SHARED_MEMORY(raw);
  const u32 base = shared_address(raw);
  float* bias_shared = reinterpret_cast<float*>(raw + kBiasAt);
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int warp_m = warp / WARPS_N, warp_n = warp % WARPS_N;
  const int columns = (width + 15) / 16, rows = (height + ROWS - 1) / ROWS;

  for (int c = tid; c < kBlocks * BN; c += kThreads) bias_shared[c] = c < COUT ? bias[c] : 0.0f;

  constexpr int kTurnsOfStep = (HaloTiles::kTurns + kSteps - 2) / (kSteps - 1);  // not in the last
  HaloTiles halo(x, h, w, base, tid);
  Weights<kWeights, static_cast<u32>(kPhases) * kChunks * kSteps * kWeights> ring(
      weights, base + kWeightsAt, tid);
  const auto begin_tile = [&](int index) {
    const Tile tile(index, columns, rows, groups);
    const int clip = tile.group / groups, group = tile.group % groups;
    // Winograd's products come in the order 1, 2, 0, 3.
    const int frame = clip * batch_stride + group * group_stride + (FORM == WINOGRAD ? 1 : 0);
    halo.begin(frame, tile.y - pad_y, tile.x - pad_x);
  };

  const u32 my_pixels = base + warp_m * MI * kRow;
  const u32 warp_weights = base + kWeightsAt + warp_n * (NI * 256);

  float a[MI][NI][4];
#if FORM != DIRECT
  float b[MI][NI][4];
#endif
#if FORM == WINOGRAD_4
  float c[MI][NI][4], d[MI][NI][4];
#endif

  int index = blockIdx.x;
  if (index >= tiles) return;
  begin_tile(index);
  for (int turn = 0; turn < HaloTiles::kTurns; ++turn) halo.load(0, turn);
#pragma unroll
  for (int stage = 0; stage < 2; ++stage) {
#pragma unroll
    for (int turn = 0; turn < ring.kTurns; ++turn) ring.load(stage * kWeights, turn, tid);
    ring.offset += kWeights;
    cp_commit();
  }
  int in_stage = 0;

  // One step of a chunk, and the copies for later ones: a part of the next chunk's halo tile, the
  // weights of two steps on. `column`, `row`: of the first tap.
  const auto step = [&](Sums& d, int number, int column, int row) {
    cp_wait<1>();
    __syncthreads();
    constexpr int kAllTaps = KC / 16 * kTaps, kPieces = kTurnsOfStep + decltype(ring)::kTurns;
    const auto load = [&](int tap) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        if (piece * (kAllTaps - 1) / kPieces != tap) continue;
        if (piece < kTurnsOfStep) {
          const int turn = number < kSteps - 1 ? number * kTurnsOfStep + piece : kHaloRows;
          halo.load((in_stage ^ 1) * kInput, turn);
        } else {
          ring.load((number + 2) % kSteps * kWeights, piece - kTurnsOfStep, tid);
        }
      }
      if (tap == kAllTaps - 1) {
        ring.next_step();
        cp_commit();
      }
    };
    const int at = lane % 16 + column;
    const u32 pixels =
        my_pixels + in_stage * kInput + row * kRow + at * kPixel + swizzle(at, lane / 16) * 16;
    products(d, pixels, warp_weights + number * kWeights, lane, load);
  };
  const auto begin_chunk = [&]() {
    const int phase = ++halo.step / kChunks;
    halo.next_chunk(FORM == WINOGRAD ? (phase == 1 ? 1 : phase == 2 ? -2 : 3)
                                     : FORM == DOUBLED ? 0 : 1);
    if (halo.step < kPhases * kChunks) return;
    const int next = index + gridDim.x;
    if (next < tiles) begin_tile(next);
    else halo.begin_nothing();
  };

#if FORM == DOUBLED
  const auto chunk = [&](int odd) {
    begin_chunk();
#pragma unroll
    for (int kx = 0; kx < 2; ++kx) step(a, kx, kx, odd);
#pragma unroll
    for (int kx = 0; kx < 2; ++kx) step(b, 2 + kx, 1 + kx, odd);
    in_stage ^= 1;
  };
#else
  const auto chunk = [&](float (&d)[MI][NI][4]) {
    begin_chunk();
#if HALF_SUMS
    Sums t;
    clear(t);
#pragma unroll 1
    for (int kx = 0; kx < 3; ++kx) step(t, kx, kx, 0);
    add_half_sums(d, t);
#else
#pragma unroll 1
    for (int kx = 0; kx < 3; ++kx) step(d, kx, kx, 0);
#endif
    in_stage ^= 1;
  };
#endif

  for (; index < tiles; index += gridDim.x) {
    ring.begin(index);
#if FORM == DOUBLED
#pragma unroll 1
    for (int odd = 0; odd < 2; ++odd) {
      clear(a);
      clear(b);
#pragma unroll 1
      for (int c = 0; c < kChunks; ++c) chunk(odd);
      const Tile tile(index, columns, rows, groups);
      const int px = tile.x + lane / 4, py = tile.y + warp_m * MI;
      const long long row = static_cast<long long>(tile.group) * 2 * height + 2 * py + odd;
      const long long pixel = row * 2 * width + 2 * px;
      const int channel = tile.block * BN + warp_n * (NI * 8);
      u16* to = static_cast<u16*>(out);
      store(a, Place{pixel, 4 * width, 16, px, py, width, height}, to, nullptr,
            bias_shared + channel, channel, lane);
      store(b, Place{pixel + 1, 4 * width, 16, px, py, width, height}, to, nullptr,
            bias_shared + channel, channel, lane);
    }
#else
    clear(a);
    [[maybe_unused]] const auto fetch_residual = [&]() {
#if FORM == WINOGRAD || FORM == WINOGRAD_4
      if (residual)
        prefetch_residual(residual, Tile(index, columns, rows, groups), groups, frames, height,
                          width, tid);
#endif
    };
    [[maybe_unused]] const auto phase = [&](float (&sums)[MI][NI][4]) {
#pragma unroll 1
      for (int k = 0; k < kChunks; ++k) chunk(sums);
    };
#if FORM == WINOGRAD_4
    clear(b);
    clear(c);
    clear(d);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      phase(a);
      if (half == 0) {
        phase(b);
        phase(c);
      }
      phase(d);
      if (half == 0) {
        frames_of_quad(a, b, c, d);
        fetch_residual();
      }
    }
#elif FORM == WINOGRAD
    clear(b);
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      phase(a);
      phase(b);
      if (half == 0) {
        sums_and_differences(a, b);
        fetch_residual();
      }
    }
#else
#pragma unroll 1
    for (int c = 0; c < kPhases * kChunks; ++c) chunk(a);
#endif
    const Tile tile(index, columns, rows, groups);
    const int clip = tile.group / groups, in_clip = tile.group % groups;
    const int first = first_frame(in_clip, frames);
    const int channel = tile.block * BN + warp_n * (NI * 8);
    const int px = tile.x + lane / 4, py = tile.y + warp_m * MI;
    const long long plane = static_cast<long long>(height) * width;
    const long long in_plane = static_cast<long long>(py) * width + px;
#if OUT == 2
    const long long frame = static_cast<long long>(clip) * COUT * frames + first;
    store(a, Place{frame * plane + in_plane, width, 8, px, py, width, height},
          static_cast<float*>(out), frames * plane, bias_shared, channel, lane);
#else
    const long long pixel = (static_cast<long long>(clip) * frames + first) * plane + in_plane;
    u16* to = static_cast<u16*>(out);
    const u16* add = static_cast<const u16*>(residual);
    const auto store_frame = [&](const float (&sums)[MI][NI][4], int frame) {
      store(sums, Place{pixel + frame * plane, width, 8, px, py, width, height}, to, add,
            bias_shared + channel, channel, lane);
    };
    if (first >= 0) store_frame(a, 0);
#if FORM == WINOGRAD
    store_frame(b, 1);
#elif FORM == WINOGRAD_4
    if (first >= -1) store_frame(b, 1);
    if (first >= -2) store_frame(c, 2);
    store_frame(d, 3);
#endif
#endif
#endif
  }
  cp_wait<0>();
}
