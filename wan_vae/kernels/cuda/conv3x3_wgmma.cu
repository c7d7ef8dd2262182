// 3x3 convolution over frames for Hopper (sm_90a): warp-specialised, persistent, tensor cores (wgmma).
//
// One tile: 16 x 16 output pixels, BN (96 or 64) output channels, two accumulators ("A" and "B"):
//   WINOGRAD 1: the two output frames of a pair, Winograd F(2,3) along time. The input holds four
//               transformed frames a pair; A gathers m1, B m2, then (A, B) = (A + B, A - B), then
//               m0 is added to A and m3 (its weights negated) to B.
//               Source: Lavin and Gray, Fast Algorithms for Convolutional Neural Networks (2015).
//   QUADS 1:    (beside WINOGRAD) the four output frames of a quad, Winograd F(4,3) along time, of
//               8 x 16 pixels: the input holds six transformed frames a quad, in the order of their
//               use. The products of the first four go to accumulators of their own, which become
//               the four frames; those of the last two are added to the first and the last. See
//               winograd.py.
//   WINOGRAD 0: one output frame, KT input frames; A and B are two blocks of BN channels (NB 2),
//               or A alone (NB 1).
//   DOUBLED 1:  the input is doubled in height and width first. That folds the 3 x 3 taps to 2 x 2,
//               others for each parity of the output's row and column: 16 x 16 input pixels make 32
//               x 32, the even rows and then the odd ones; A and B are the even and odd columns.
// One halo tile of 18 x 18 pixels x 32 channels in shared memory serves all nine taps: a tap moves
// the start address of the tensor core's operand by whole pixels. Loads beyond the picture's edge
// give zeros, which is the padding. Weights arrive packed in the order of their use, as shared
// memory wants them.
//
// A residual comes through the ring of halo tiles too, behind the last of them: 16 x 16 pixels x 32
// channels a stage, in the order in which the accumulators are stored.
//
// Warpgroup 0 loads; warpgroups 1 and 2 compute the upper and lower eight rows (QUADS: the left and
// right eight columns). The sum of an output pixel runs over (phase, 32 channels, ky, kx, 16
// channels) whatever its place in tile and picture: its bits depend on nothing but its inputs.
// Clusters of two programs that share each load of weights were slower: docs/performance.md.
//
// Stands behind hopper.cuh, which has the instructions. Compiled at run time with these macros: CIN,
// COUT, WINOGRAD, QUADS, DOUBLED, KT, BN, NB, BF16_OUT, and BF16_IN: input and weights are bfloat16,
// not float16.

constexpr int kBlockK = 32;                      // channels of one halo tile
constexpr int kChunks = CIN / kBlockK;
constexpr int kPhases = QUADS ? 6 : WINOGRAD ? 4 : DOUBLED ? 2 : KT;
constexpr int kFrames = QUADS ? 4 : WINOGRAD ? 2 : 1;  // that a tile makes
constexpr int kRows = QUADS ? 8 : 16;            // of 16 pixels, of a tile
constexpr int kHalves = QUADS ? 1 : 2;           // of a tile's columns, that a warpgroup has
constexpr int kHalo = 18;
constexpr int kPixelBytes = kBlockK * 2;
constexpr int kRowBytes = kHalo * kPixelBytes;
constexpr int kInputBytes = (kRows + 2) * kRowBytes;  // what a load brings
constexpr int kInputStage = (kInputBytes + 1023) / 1024 * 1024;
constexpr int kWeightTap = BN * kPixelBytes;
constexpr int kRegisters = BN / 2;              // of one accumulator of 64 pixels, per thread
constexpr int kWeightStage = (DOUBLED ? 4 : 3) * kWeightTap;  // one row of taps; DOUBLED: of both
constexpr int kRowsOfTaps = DOUBLED ? 2 : 3 * (WINOGRAD ? 1 : NB);  // for each halo tile
// What fits, as it was measured to be fastest.
constexpr int kInputStages = QUADS ? 5 : WINOGRAD && CIN > 96 ? 4 : 3;
constexpr int kWeightStages = (kInputStages == 4 ? (BN == 96 ? 7 : 10) : (BN == 96 ? 8 : 12)) * 3 /
                              (DOUBLED ? 4 : 3);
constexpr int kGroups = BN / 32;                 // of 32 channels that are stored together
constexpr int kResidualBytes = kRows * 16 * 64;
constexpr int kOutputBlocks = COUT / (BN * (WINOGRAD ? 1 : NB));
// Shared memory, from a base aligned to 1024 bytes: inputs, weights, bias, barriers.
constexpr int kWeightsAt = kInputStages * kInputStage;
constexpr int kBiasAt = kWeightsAt + kWeightStages * kWeightStage;
constexpr int kBarriersAt = kBiasAt + COUT * 4;
constexpr int kComputingWarps = 8;
static_assert(!QUADS || WINOGRAD, "quads are a form of Winograd");
static_assert(kWeightStage % 16 == 0, "what the copy engine moves");

struct Ring {  // a place in a ring of stages, and the parity of its barriers
  int stage;
  u32 parity;
  template <int STAGES>
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) {
      stage = 0;
      parity ^= 1;
    }
  }
};

struct Barriers {
  u32 base;
  __device__ __forceinline__ u32 input_full(int s) const { return base + 8 * s; }
  __device__ __forceinline__ u32 input_empty(int s) const { return base + 8 * (kInputStages + s); }
  __device__ __forceinline__ u32 weight_full(int s) const {
    return base + 8 * (2 * kInputStages + s);
  }
  __device__ __forceinline__ u32 weight_empty(int s) const {
    return base + 8 * (2 * kInputStages + kWeightStages + s);
  }
};

struct Tile {
  int block, x, y, group;  // block of output channels, first column and row, pair, quad or frame
  __device__ __forceinline__ Tile(int index, int columns, int rows, int groups) {
    block = index % kOutputBlocks;
    index /= kOutputBlocks;
#if WINOGRAD
    // The pairs of a clip side by side: the next one reads two of the same frames, then from L2.
    const int in_clip = index % groups;
    index /= groups;
#endif
    x = index % columns * 16;
    index /= columns;
    y = index % rows * kRows;
    group = index / rows;
#if WINOGRAD
    group = group * groups + in_clip;
#endif
  }
};

// The first frame of a pair or a quad in its clip. They end with the last frame: those of the first
// one that have a negative number are of the past.
__device__ __forceinline__ int first_frame(int group, int frames) {
  return group * kFrames - (-frames & (kFrames - 1));
}

// Four lanes hold rows of a 4 x 4 matrix of words by column; afterwards each holds one row.
__device__ __forceinline__ uint4 transpose_quad(u32 a0, u32 a1, u32 a2, u32 a3, int lane) {
  const bool odd = lane & 1, high = lane & 2;
  const u32 x = __shfl_xor_sync(0xffffffffu, odd ? a0 : a1, 1);
  const u32 y = __shfl_xor_sync(0xffffffffu, odd ? a2 : a3, 1);
  const u32 b0 = odd ? x : a0, b1 = odd ? a1 : x, b2 = odd ? y : a2, b3 = odd ? a3 : y;
  const u32 p = __shfl_xor_sync(0xffffffffu, high ? b0 : b2, 2);
  const u32 q = __shfl_xor_sync(0xffffffffu, high ? b1 : b3, 2);
  return high ? make_uint4(p, q, b2, b3) : make_uint4(b0, b1, p, q);
}

// Where a warpgroup's part of a tile goes: `pixel` is the index of this lane's upper left pixel, the
// others are a row below, `below` pixels on, and eight columns; `inside` has a bit for each of them.
struct Place {
  u32* out;
  long long pixel;
  int below, inside;
};

__device__ __forceinline__ int pixels_inside(int x, int y, int width, int height) {
  return (y < height ? (x < width) | (x + 8 < width) << 2 : 0) |
         (y + 1 < height ? (x < width) << 1 | (x + 8 < width) << 3 : 0);
}

// 32 channels of an accumulator -> out, with bias and residual, rounded once. `residual`: address of
// this warp's first pixel in a stage of the ring, or 0.
template <int GROUP>
__device__ __forceinline__ void store_channels(const float (&d)[kHalves][kRegisters], const Place& to,
                                               const float* bias, int channel, u32 residual,
                                               int lane) {
  const int q = lane & 3;
#pragma unroll
  for (int part = 0; part < 2 * kHalves; ++part) {
    const int half = part / 2, lower = part % 2;
    const int in_tile = lower * 16 + half * 8 + lane / 4;  // pixel within the warp's two rows
    u32 words[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int column = GROUP * 4 + j;
      u32 before = 0;
      if (residual)
        before = load_shared_word(residual + in_tile * 64 + ((j ^ (in_tile / 2 % 4)) * 16 + q * 4));
      const float2 b = *reinterpret_cast<const float2*>(bias + channel + j * 8 + q * 2);
      float r0, r1;
      unpack(before, r0, r1);
      words[j] = pack(d[half][column * 4 + lower * 2] + (b.x + r0),
                      d[half][column * 4 + lower * 2 + 1] + (b.y + r1));
    }
    const uint4 row = transpose_quad(words[0], words[1], words[2], words[3], lane);
    if (to.inside >> part & 1) {
      const int beside = half * 8 * (DOUBLED ? 2 : 1);
      const long long at = (to.pixel + lower * to.below + beside) * COUT + channel;
      *reinterpret_cast<uint4*>(to.out + at / 2 + q * 4) = row;
    }
    // No loads of later parts before this point: they would not fit in registers.
    asm volatile("" ::: "memory");
  }
}

// What a consumer still has to give back once the tensor cores are done with it.
struct Pending {
  int weight, input;
};

__device__ __forceinline__ void give_back(const Barriers& barriers, Pending& pending, bool leader) {
  if (leader && pending.weight >= 0) barrier_arrive(barriers.weight_empty(pending.weight));
  if (leader && pending.input >= 0) barrier_arrive(barriers.input_empty(pending.input));
  pending.weight = pending.input = -1;
}

struct Consumer {
  Barriers barriers;
  u32 inputs, weights;  // addresses; `inputs` at this warpgroup's first row
  Ring input, weight;
  Pending pending;
  bool leader;

  // One row of taps into d: three taps, twice 16 channels, both halves of the tile's columns.
  __device__ __forceinline__ void row_of_taps(float (&d)[kHalves][kRegisters], int ky, int add) {
    barrier_wait(barriers.weight_full(weight.stage), weight.parity);
    const u64 a = descriptor(inputs + input.stage * kInputStage + ky * kRowBytes, kRowBytes);
    const u64 b = descriptor(weights + weight.stage * kWeightStage, 8 * kPixelBytes);
    wgmma_fence();
#pragma unroll
    for (int kx = 0; kx < 3; ++kx) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int half = 0; half < kHalves; ++half) {
          wgmma(d[half], a + (kx * kPixelBytes + k * 32 + half * 8 * kPixelBytes) / 16,
                b + (kx * kWeightTap + k * 32) / 16, (kx | k) ? 1 : add);
        }
      }
    }
    issued();
  }

  // The same where the input was doubled: two taps for the even columns into a, two for the odd ones
  // into b, on the rows of pixels `row` of the halo tile.
  __device__ __forceinline__ void row_of_folded_taps(float (&a)[kHalves][kRegisters],
                                                     float (&b)[kHalves][kRegisters], int row, int add) {
    barrier_wait(barriers.weight_full(weight.stage), weight.parity);
    const u64 x = descriptor(inputs + input.stage * kInputStage + row * kRowBytes, kRowBytes);
    const u64 w = descriptor(weights + weight.stage * kWeightStage, 8 * kPixelBytes);
    wgmma_fence();
#pragma unroll
    for (int kx = 0; kx < 2; ++kx) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u64 from = x + (kx * kPixelBytes + k * 32 + half * 8 * kPixelBytes) / 16;
          wgmma(a[half], from, w + (kx * kWeightTap + k * 32) / 16, (kx | k) ? 1 : add);
          wgmma(b[half], from + kPixelBytes / 16, w + ((2 + kx) * kWeightTap + k * 32) / 16,
                (kx | k) ? 1 : add);
        }
      }
    }
    issued();
  }

  __device__ __forceinline__ void issued() {
    wgmma_commit();
    wgmma_wait<1>();  // all but what was just issued
    give_back(barriers, pending, leader);
    pending.weight = weight.stage;
    weight.next<kWeightStages>();
  }

  __device__ __forceinline__ void drain() {
    wgmma_wait<0>();
    give_back(barriers, pending, leader);
  }

  __device__ __forceinline__ void wait_input() {
    barrier_wait(barriers.input_full(input.stage), input.parity);
  }
  __device__ __forceinline__ void leave_input() {
    pending.input = input.stage;
    input.next<kInputStages>();
  }

  // An accumulator -> out; a residual's stages are given back one by one.
  __device__ __forceinline__ void store(const float (&d)[kHalves][kRegisters], const Place& to,
                                        const float* bias, int channel, bool has_residual,
                                        u32 in_stage, int lane) {
    store_group<0>(d, to, bias, channel, has_residual, in_stage, lane);
    store_group<1>(d, to, bias, channel, has_residual, in_stage, lane);
    if constexpr (kGroups > 2) store_group<2>(d, to, bias, channel, has_residual, in_stage, lane);
  }

  template <int GROUP>
  __device__ __forceinline__ void store_group(const float (&d)[kHalves][kRegisters], const Place& to,
                                              const float* bias, int channel, bool has_residual,
                                              u32 in_stage, int lane) {
    u32 residual = 0;
    if (has_residual) {
      wait_input();
      residual = in_stage + input.stage * kInputStage;
    }
    store_channels<GROUP>(d, to, bias, channel + GROUP * 32, residual, lane);
    if (has_residual) {
      __syncwarp();
      if (leader) barrier_arrive(barriers.input_empty(input.stage));
      input.next<kInputStages>();
    }
  }

  // One phase of Winograd: a transformed frame times its weights.
  __device__ __forceinline__ void phase(float (&d)[kHalves][kRegisters], int add) {
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      wait_input();
#pragma unroll
      for (int ky = 0; ky < 3; ++ky) row_of_taps(d, ky, (chunk | ky) ? 1 : add);
      leave_input();
    }
  }
};

// x: [frames, H, W, CIN] behind `map`. weights: packed, see conv3x3_wgmma.py. out, and with `has_residual`
// what `residual` maps: [clips * frames, height, width, COUT]. A group is a pair (WINOGRAD), a
// quad or a frame: `groups` of them in each clip, whose input begins `group_stride` frames after each
// other and `batch_stride` a clip. tiles: of all programs.
extern "C" __global__ void __launch_bounds__(384, 1)
conv3x3(const __grid_constant__ TensorMap map, const __grid_constant__ TensorMap residual,
        const char* weights, const float* bias, u32* out, int has_residual, int frames, int height,
        int width, int groups, int group_stride, int batch_stride, int pad_y, int pad_x,
        int tiles) {
  SHARED_MEMORY(raw);
  const u32 base = (shared_address(raw) + 1023) & ~1023u;
  char* shared = raw + (base - shared_address(raw));
  const Barriers barriers{base + kBarriersAt};
  float* bias_shared = reinterpret_cast<float*>(shared + kBiasAt);
  const int columns = (width + 15) / 16, rows = (height + kRows - 1) / kRows;

  if (threadIdx.x == 0) {
    for (int s = 0; s < kInputStages; ++s) {
      barrier_init(barriers.input_full(s), 1);
      barrier_init(barriers.input_empty(s), kComputingWarps);
    }
    for (int s = 0; s < kWeightStages; ++s) {
      barrier_init(barriers.weight_full(s), 1);
      barrier_init(barriers.weight_empty(s), kComputingWarps);
    }
    barriers_exist();
  }
  for (int c = threadIdx.x; c < COUT; c += 384) bias_shared[c] = bias[c];
  __syncthreads();

  if (threadIdx.x < 128) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      Ring input{0, 1}, weight{0, 1};  // an empty ring needs no waiting in its first round
      constexpr int kStagesOfBlock = kPhases * kChunks * kRowsOfTaps;
      const auto load_input = [&](const TensorMap* from, int bytes, int channel, int x, int y,
                                  int frame) {
        barrier_wait(barriers.input_empty(input.stage), input.parity);
        barrier_expect(barriers.input_full(input.stage), bytes);
        load_tile(base + input.stage * kInputStage, from, barriers.input_full(input.stage), channel,
                  x, y, frame);
        input.next<kInputStages>();
      };
      for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
        const Tile tile(index, columns, rows, groups);
        const int clip = tile.group / groups, group = tile.group % groups;
        const int first = clip * batch_stride + group * group_stride;
        const char* w =
            weights + static_cast<long long>(tile.block) * kStagesOfBlock * kWeightStage;
        for (int step = 0; step < kPhases; ++step) {
          // The products of F(2,3) in the order 1, 2, 0, 3: see the top of the file.
          const int frame = QUADS ? step : WINOGRAD ? (step == 0 ? 1 : step == 1 ? 2 : step == 2 ? 0 : 3)
                                     : DOUBLED ? 0 : step;
          for (int chunk = 0; chunk < kChunks; ++chunk) {
            load_input(&map, kInputBytes, chunk * kBlockK, tile.x - pad_x, tile.y - pad_y,
                       first + frame);
            for (int r = 0; r < kRowsOfTaps; ++r) {
              barrier_wait(barriers.weight_empty(weight.stage), weight.parity);
              barrier_expect(barriers.weight_full(weight.stage), kWeightStage);
              load_bytes(base + kWeightsAt + weight.stage * kWeightStage, w, kWeightStage,
                         barriers.weight_full(weight.stage));
              w += kWeightStage;
              weight.next<kWeightStages>();
            }
          }
        }
        if (!has_residual) continue;
        for (int i = 0; i < (WINOGRAD ? kFrames : NB) * kGroups; ++i) {
          // A frame of the past is another clip's, or none: it is not stored.
          const int frame = first_frame(group, frames) + (WINOGRAD ? i / kGroups : 0);
          const int channel = tile.block * BN * (WINOGRAD ? 1 : NB) +
                              (WINOGRAD ? i % kGroups : i) * 32;
          load_input(&residual, kResidualBytes, channel, tile.x, tile.y, clip * frames + frame);
        }
      }
    }
  } else {
    take_registers<232>();
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 first_pixel = base + group * 8 * (QUADS ? kPixelBytes : kRowBytes);
    Consumer consumer{barriers,   first_pixel, base + kWeightsAt, Ring{0, 0},
                      Ring{0, 0}, Pending{-1, -1}, lane == 0};
    float a[kHalves][kRegisters], b[kHalves][kRegisters];
#if QUADS
    float c[kHalves][kRegisters], d[kHalves][kRegisters];
#endif
    for (int index = blockIdx.x; index < tiles; index += gridDim.x) {
#if QUADS
      consumer.phase(a, 0);
      consumer.phase(b, 0);
      consumer.phase(c, 0);
      consumer.phase(d, 0);
      consumer.drain();
#pragma unroll
      for (int i = 0; i < kRegisters; ++i) frames_of_quad(a[0][i], b[0][i], c[0][i], d[0][i]);
      consumer.phase(a, 1);
      consumer.phase(d, 1);
#elif WINOGRAD
      consumer.phase(a, 0);
      consumer.phase(b, 0);
      consumer.drain();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < kRegisters; ++i) sum_and_difference(a[half][i], b[half][i]);
      }
      consumer.phase(a, 1);
      consumer.phase(b, 1);
#elif DOUBLED
      for (int odd = 0; odd < 2; ++odd) {
        for (int chunk = 0; chunk < kChunks; ++chunk) {
          consumer.wait_input();
#pragma unroll
          for (int ky = 0; ky < 2; ++ky) consumer.row_of_folded_taps(a, b, odd + ky, chunk | ky);
          consumer.leave_input();
        }
        consumer.drain();
        const Tile tile(index, columns, rows, groups);
        const int x = tile.x + lane / 4, y = tile.y + group * 8 + warp * 2;
        const long long row = static_cast<long long>(tile.group) * 2 * height + 2 * y + odd;
        const long long pixel = row * 2 * width + 2 * x;
        const int inside = pixels_inside(x, y, width, height);
        consumer.store(a, Place{out, pixel, 4 * width, inside}, bias_shared, tile.block * BN, false,
                       0, lane);
        consumer.store(b, Place{out, pixel + 1, 4 * width, inside}, bias_shared, tile.block * BN,
                       false, 0, lane);
      }
#else
      for (int step = 0; step < kPhases * kChunks; ++step) {
        consumer.wait_input();
#pragma unroll
        for (int ky = 0; ky < 3; ++ky) {
          consumer.row_of_taps(a, ky, (step | ky) ? 1 : 0);
#if NB == 2
          consumer.row_of_taps(b, ky, (step | ky) ? 1 : 0);
#endif
        }
        consumer.leave_input();
      }
#endif
#if !DOUBLED
      consumer.drain();
      const Tile tile(index, columns, rows, groups);
      const int clip = tile.group / groups, in_clip = tile.group % groups;
#if QUADS
      const int x = tile.x + group * 8 + lane / 4, y = tile.y + warp * 2;
      const u32 in_stage = base + (warp * 2 * 16 + group * 8) * 64;
#else
      const int x = tile.x + lane / 4, y = tile.y + group * 8 + warp * 2;
      const u32 in_stage = base + (group * 8 + warp * 2) * 16 * 64;
#endif
      const int inside = pixels_inside(x, y, width, height);
      const long long plane = static_cast<long long>(height) * width;
      const int first = first_frame(in_clip, frames);
      const long long pixel = (static_cast<long long>(clip) * frames + first) * plane +
                              static_cast<long long>(y) * width + x;
      const int channel = tile.block * BN * (WINOGRAD ? 1 : NB);
      consumer.store(a, Place{out, pixel, width, first < 0 ? 0 : inside}, bias_shared, channel,
                     has_residual, in_stage, lane);
#if QUADS
      consumer.store(b, Place{out, pixel + plane, width, first < -1 ? 0 : inside}, bias_shared,
                     channel, has_residual, in_stage, lane);
      consumer.store(c, Place{out, pixel + 2 * plane, width, first < -2 ? 0 : inside}, bias_shared,
                     channel, has_residual, in_stage, lane);
      consumer.store(d, Place{out, pixel + 3 * plane, width, inside}, bias_shared, channel,
                     has_residual, in_stage, lane);
#elif WINOGRAD
      consumer.store(b, Place{out, pixel + plane, width, inside}, bias_shared, channel,
                     has_residual, in_stage, lane);
#elif NB == 2
      consumer.store(b, Place{out, pixel, width, inside}, bias_shared, channel + BN, has_residual,
                     in_stage, lane);
#endif
#endif
    }
  }
}
